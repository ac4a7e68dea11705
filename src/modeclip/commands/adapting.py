"""The commands that make a model out of models: finetune, on a small set of your own, and merge."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.adapting.finetuning import FinetuneConfig
from modeclip.adapting.merging import MergeConfig
from modeclip.evaluation.intervals import Interval
from modeclip.system.console import print_json, print_lines, print_table
from modeclip.system.options import AsJson, CatalogPath, Mask, Where

Model = Positional[
    Annotated[str, arg(help="Model to start from: a model folder, BUNDLE#expert-1, NAME@TAG or hf-hub:...")]
]
Models = Positional[
    Annotated[
        tuple[str, ...],
        arg(metavar="SOURCE...", help="Models, BUNDLE#expert-1; a bundle stands for its finished experts."),
    ]
]
Tasks = Annotated[str | None, arg(help="Catalog of zero-shot tasks, such as tasks.lance of a run.")]
Out = Annotated[Path, arg(help="Folder of the new model.")]


def finetune(
    model: Model,
    catalog: CatalogPath,
    config: Annotated[OmitArgPrefixes[FinetuneConfig], arg(name="training")],
    *,
    out: Out,
    tasks: Tasks = None,
    where: Where = (),
    mask: Mask = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on a small set of your own without losing what it could do, and show both before and after."""
    from modeclip.adapting.finetuning import finetune as run_finetune
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.pages.finetune_page import write_finetuning

    selection = Selection(where=where, mask=mask)
    result = run_finetune(model, Catalog.open(catalog), config, out=out, tasks=tasks, selection=selection)
    page = write_finetuning(result, out)
    if as_json:
        print_json(asdict(result))
        return
    rows = [
        (
            *(row.name, f"{row.num_images:,}", _score(row.chance), _score(row.majority)),
            *(*map(_percent, (row.before, row.tuned, row.after)), _points(row.change)),
        )
        for row in result.table
    ]
    title = f"alpha {result.alpha:g}, {result.num_train:,} pairs, {result.steps:,} of {result.planned_steps:,} steps"
    columns = ["accuracy in %", "images", "chance", "majority class", "before", "tuned", "after", "change"]
    print_table(title, columns, rows, in_parts=True)
    print_lines(f"model: {result.folder}", f"page: {page}")


def merge(
    models: Models,
    config: Annotated[OmitArgPrefixes[MergeConfig], arg(name="merging")],
    *,
    out: Out,
    tasks: Tasks = None,
    where: Where = (),
    mask: Mask = None,
    as_json: AsJson = False,
) -> None:
    """Average the weights of models that come from one seed: all, weighted, or only those that help (greedy)."""
    from modeclip.adapting.merging import merge as run_merge
    from modeclip.data.selection import Selection

    result = run_merge(models, config, out=out, tasks=tasks, selection=Selection(where=where, mask=mask))
    if as_json:
        print_json(asdict(result))
        return
    rows = [
        (candidate.name, f"{candidate.weight:.3f}", _score(candidate.score), _score(candidate.soup_score))
        for candidate in result.candidates
    ]
    rows.append(("average", "", _score(result.score), ""))
    print_table(f"{result.how} average", ["model", "weight", "accuracy in %", "with those before"], rows)
    for name in result.left_out:
        print_lines(f"left out, its seed stands in for it: {name}")
    print_lines(f"model: {result.folder}")


def _score(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _points(interval: Interval) -> str:
    return f"{100 * interval.mean:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
