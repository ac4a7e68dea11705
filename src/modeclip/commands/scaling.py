"""The command that fits scaling laws: scaling. Parse, call, print."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.commands.data import AsJson
from modeclip.evaluation.intervals import Interval
from modeclip.evaluation.scaling import ScalingConfig, ScalingResult
from modeclip.system.console import print_json, print_table

Results = Positional[
    Annotated[
        tuple[Path, ...],
        arg(
            metavar="RESULTS...",
            help="Files of JSON lines: name, family (dense, mode-4, ...), compute in FLOPs (or flops_per_sample and "
            "samples), error (or accuracy) as a fraction, seed.",
        ),
    ]
]


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(ScalingConfig):
    """How scaling laws are fitted."""

    def __post_init__(self) -> None:
        """Leave the checks to the `ScalingConfig` that is made of it, whose errors are one line."""


def scaling(
    results: Results,
    config: Annotated[OmitArgPrefixes[ScalingOptions], arg(name="fitting")],
    *,
    out: Annotated[Path | None, arg(help="Folder for scaling.html, scaling.svg and scaling.json.")] = None,
    what: Annotated[str, arg(help="What the error is of, for the picture.")] = "error",
    as_json: AsJson = False,
) -> None:
    """Fit error = A * compute^(-b) to results of several sizes and budgets, one law a family, with intervals."""
    from modeclip.evaluation.scaling import fit_scaling, read_points
    from modeclip.pages.scaling_page import RESULT_FILE, write_scaling
    from modeclip.system.files import write_atomically

    result = fit_scaling(read_points(results), ScalingConfig(**asdict(config)))
    pages = write_scaling(result, out, what) if out is not None else ()
    if out is not None:
        write_atomically(out / RESULT_FILE, json.dumps(asdict(result), indent=1, allow_nan=False) + "\n")
    if as_json:
        print_json(asdict(result))
        return
    print_table(*_table(result))
    for page in pages:
        print(page)


def _table(result: ScalingResult) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows of what is printed."""
    reference = result.laws[0].family
    rows = [
        [
            law.family,
            f"{law.num_points} of {sum(point.family == law.family for point in result.points)}",
            _with_ends(law.A, "{:.3g}"),
            _with_ends(law.b, "{:.3f}"),
            _with_ends(law.best_error, "{:.1%}"),
            "" if law.compute_ratio is None else _with_ends(law.compute_ratio, "{:.0%}"),
        ]
        for law in result.laws
    ]
    columns = ["family", "points", "A", "b", "error at its largest compute", f"compute for {reference}'s error"]
    where = "the Pareto frontier" if result.config.points == "frontier" else "all points"
    return f"error = A * compute^(-b), fitted to {where}", columns, rows


def _with_ends(interval: Interval, form: str) -> str:
    return f"{form.format(interval.mean)} ({form.format(interval.low)} to {form.format(interval.high)})"
