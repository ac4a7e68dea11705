"""The command that tries what to train on your data: pilot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, PositionalRequiredArgs, arg

from modeclip.data.sources.options import DataConfig
from modeclip.pipeline.pilot_plan import PilotConfig
from modeclip.system.console import in_points, print_json, print_lines, print_table
from modeclip.system.options import AsJson


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
    page = str(out / PAGE_FILE)
    if as_json:
        print_json(result | {"page": page})
        return
    _print_rows(result)
    said = [result["verdict"]["sentence"], *filter(None, [result.get("outlook")])]
    print_lines(*result["notes"], *said, f"page: {page}")


def _print_rows(result: dict[str, Any]) -> None:
    """Print what each way gains and costs."""
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
