"""The commands that say what to train: pilot, on your data, and demo, on real icons after the whole method."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, PositionalRequiredArgs, arg

from modeclip.data.sources.options import DataConfig
from modeclip.pipeline.pilot_plan import PilotConfig
from modeclip.system.console import in_points, print_json, print_lines, print_table
from modeclip.system.options import AsJson
from modeclip.system.paths import RunPaths

WORDS = ("umbrella", "shopping cart", "heart", "camera", "bicycle", "calendar")
"""What the demo looks for, and what it tells apart."""
NAMES = (
    "arrow,calendar,cloud,file,folder,heart,home,lock,mail,map,phone,star,user,video,camera,clock,shield,battery,bell,"
    "book"
)
"""Class names that the demo's pilot is for."""
DEMO = PilotConfig(classes=NAMES, model="modeclip-icon-xs", samples=131_072, pairs=25_000, seeds=1)
"""The demo's pilot: one seed of that of `runs/pilot.json`."""
LONGER = (
    "Another length may have another answer: after 2.5 times the samples, on larger towers, an expert for these names "
    "gained nothing on these icons (docs/results.md, The demo). Ask it of your own pairs, at your own length."
)
"""What the demo says after its pilot; `runs/demo.jsonl` has what it rests on, and a test compares them."""


def pilot(
    data: PositionalRequiredArgs[OmitArgPrefixes[DataConfig]],
    config: Annotated[OmitArgPrefixes[PilotConfig], arg(name="piloting")],
    out: Annotated[Path, arg(help="Folder of the pilot.")] = Path("runs/pilot"),
    *,
    as_json: AsJson = False,
) -> None:
    """Try on a sample of your pairs what to train at equal cost: one model, experts of several kinds, curated data."""
    from modeclip.pages.pilot_page import PAGE_FILE
    from modeclip.pipeline.pilot import pilot as run_pilot

    result = run_pilot(data, config, out)
    page = out / PAGE_FILE
    if as_json:
        print_json(result | {"page": str(page)})
    else:
        _print_pilot(result, page)


def demo(out: Annotated[Path, arg(help="Folder of the run.")] = Path("runs/demo"), *, as_json: AsJson = False) -> None:
    """Run the whole method on real icons, try what pays for twenty class names, and open what was found."""
    from modeclip.pages.pilot_page import PAGE_FILE
    from modeclip.pipeline import stages
    from modeclip.pipeline.pilot import pilot as run_pilot
    from modeclip.pipeline.recipe import demo_recipe, load_recipe

    result, folder = stages.run(load_recipe(demo_recipe()), out), out / "pilot"
    tried, page = run_pilot(DataConfig(source="icons"), DEMO, folder), folder / PAGE_FILE
    if as_json:
        print_json(result.results | {"pilot": tried})
    else:
        _print_first_use(out)
        print_lines(f"what to train for {tried['num_classes']} class names? a pilot on a sample of the same icons:")
        _print_pilot(tried, page)
        print_lines(LONGER, f"report: {result.report} (every model and every routing rule of the long run)")
        _print_commands(out)
    if sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
        for shown in (RunPaths(folder=out).report, page):
            webbrowser.open(shown.resolve().as_uri())


def _print_pilot(result: dict[str, Any], page: Path) -> None:
    """Print what each way gains and costs, and what to train."""
    measures = list(result["questions"])
    rows = []
    for row in result["rows"]:
        found = []
        for measure in measures:
            found += [in_points(row["gain"].get(measure)), f"{100 * row['score'][measure]:.1f}"]
        costs = (f"{row['cost']:.2f}", f"{row['seconds']:,.0f}", f"{row['towers']:.3g}", f"{row['megabytes']:.1f}")
        rows.append((row["title"], *found, *costs))
    heads = [head for measure in measures for head in (f"gain, {measure}", measure)]
    seeds = result["plan"]["seeds"]
    title = (
        f"percentage points over one dense model of the same cost, {seeds} seed{'s' if seeds > 1 else ''} "
        "(95 % for all rows together)"
    )
    print_table(title, ["way to train", *heads, "cost", "seconds", "towers", "MB"], rows)
    said = [result["verdict"]["sentence"], *filter(None, [result.get("outlook")])]
    print_lines(*result["notes"], *said, f"page: {page}")


def _print_first_use(out: Path) -> None:
    """Print what words find among the held-out pictures, and what some of these show."""
    from modeclip.pipeline.first_use import first_use

    tried = first_use(RunPaths(folder=out), WORDS)
    print_table(
        f"what words find among {tried.pictures:,} pictures that no model has seen",
        ["words", "expert", "first", "second", "third"],
        [(one.words, f"{one.expert} {one.weight:.2f}", *one.captions) for one in tried.looked],
    )
    print_table(
        "what a picture shows, which expert says so, and the captions that it was chosen for",
        ["picture", "answer", "share", "expert", "captions near the answer"],
        [
            (one.picture, one.answer, f"{one.probability:.2f}", f"{one.expert} {one.weight:.2f}", ", ".join(one.near))
            for one in tried.named
        ],
    )


def _print_commands(out: Path) -> None:
    """Print what to type after the demo: the pilot on one's own pairs, then what the models can do."""
    folder = shlex.quote(str(out))
    print_lines(
        "next:",
        "modeclip pilot YOUR_PAIRS --classes NAMES.txt --minutes 30",
        f"modeclip classify {folder}/bundle PICTURE --classes {NAMES}",
        f'modeclip search {folder}/held-out.index "a red umbrella" --sheet found.png',
        f"modeclip serve {folder}",
    )
