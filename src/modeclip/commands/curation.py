"""The command that decides which pairs are trained on: curate, with a method behind the catalog.

modeclip curate CATALOG METHOD [options]
modeclip curate CATALOG compare A B
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from modeclip.curation.curating import METHODS, load_method
from modeclip.data.checks import format_share
from modeclip.errors import ModeclipError, unknown
from modeclip.pages.html import format_amount, format_figure
from modeclip.system.console import print_json, print_lines, print_table
from modeclip.system.options import AsJson, CatalogPath, Mask, Ray, Where
from modeclip.system.paths import RunPaths, is_url

if TYPE_CHECKING:
    from modeclip.curation.explaining import Explanation
    from modeclip.curation.surveying import Group, Survey
    from modeclip.data.catalog import Catalog

NUM_EXAMPLES, EXAMPLE_WIDTH = 3, 28
"""Captions that are printed as examples of a cause, and their letters."""
NUM_CLUSTERS = 6
"""Clusters that are printed."""

Column = Annotated[
    str | None,
    arg(help="What the names of the new columns begin with: NAME_kept, NAME_cause, ...; default: the method."),
]


def curate(
    catalog: CatalogPath,
    method: Positional[Annotated[str, arg(metavar="METHOD", help=f"One of {', '.join(METHODS)}, or compare.")]],
) -> None:
    """Decide which pairs of a catalog are trained on, and show why; CATALOG METHOD --help tells the settings."""
    del catalog
    raise unknown("method", method, [*METHODS, "compare"])


def compare(
    catalog: CatalogPath,
    a: Positional[Annotated[str, arg(metavar="A", help="Name of a curation, a column of booleans, or a .npy of ids.")]],
    b: Positional[Annotated[str, arg(metavar="B", help="Another one.")]],
    *,
    out: Annotated[
        Path | None, arg(help="Folder of compare.html; default: curation/A-B beside a local catalog.")
    ] = None,
    seed: Annotated[int, arg(help="Decides the examples and the samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two selections of a catalog's pairs: how far they overlap, and what only one of them keeps."""
    from modeclip.curation.comparing import compare as run_compare
    from modeclip.data.catalog import Catalog
    from modeclip.pages.curate_page import write_comparison

    opened = Catalog.open(catalog)
    folder = folder_of(opened, out, "-".join(Path(name).name.removesuffix(".npy") for name in (a, b)))
    comparison = run_compare(opened, a, b, seed=seed)
    page = write_comparison(opened, comparison, folder)
    if as_json:
        print_json(asdict(comparison) | {"page": str(page)})
        return
    print_groups(comparison.sentence, "pairs that", comparison.groups, comparison.num_pairs)
    print_survey(comparison.survey)
    print_lines(f"page: {page}")


def folder_of(catalog: Catalog, out: Path | None, name: str) -> Path:
    """Return the folder of a page.

    Raises:
        ModeclipError: The catalog is in an object store and no folder was given, or there is a file in its place.
    """
    if out is None:
        if is_url(catalog.path):
            raise ModeclipError("curate: the catalog lies in an object store; give --out FOLDER on this machine")
        out = RunPaths(folder=Path(catalog.path).parent).curation / name
    if out.exists() and not out.is_dir():
        raise ModeclipError(f"--out {out}: expected a folder, found a file; choose another path")
    return out


def print_explanation(explanation: Explanation) -> None:
    """Print what a curation has done: causes, what the method found, before and after."""
    groups = (explanation.kept, *explanation.causes)
    print_groups(explanation.sentence, "cause", groups, explanation.num_selected)
    for table in explanation.tables:
        print_table(table.title, table.columns, table.rows)
    print_survey(explanation.survey)
    columns = ", ".join(explanation.columns)
    if explanation.is_written:
        print_lines(f"columns of {explanation.catalog}: {columns}")
    else:
        print_lines(f"nothing was written; without --dry-run {explanation.catalog} gets the columns {columns}")


def print_groups(title: str, heading: str, groups: Sequence[Group], total: int) -> None:
    """Print how many pairs had which fate, with some of their captions."""
    rows = []
    for group in groups:
        captions = dict.fromkeys(pair.new_caption or pair.caption for pair in group.pairs)
        some = [textwrap.shorten(caption, EXAMPLE_WIDTH, placeholder="…") for caption in captions][:NUM_EXAMPLES]
        rows.append((group.name, f"{group.count:,}", format_share(group.count, total), " · ".join(some)))
    print_table(title, [heading, "pairs", "share", "examples"], rows)


def print_survey(survey: Survey) -> None:
    """Print head and tail on each side, and the clusters that differ most."""
    rows = [
        ("distinct captions", *(format_amount(spread.distinct) for spread in survey.captions.spreads)),
        ("pairs of the most frequent 1 % of captions", *(_percent(spread.head) for spread in survey.captions.spreads)),
        ("captions that occur once", *(_percent(spread.once) for spread in survey.captions.spreads)),
        ("distinct words", *(format_amount(spread.distinct) for spread in survey.words.spreads)),
    ]
    if survey.negatives:
        met = (format_figure(report.kinds[0].false_per_pair.mean) for report in survey.negatives)
        rows.append((f"false negatives in a random batch of {survey.negatives[0].batch_size}", *met))
    print_table("head and tail", ["", *survey.sides], rows)
    if survey.clusters and any(cluster.change for cluster in survey.clusters.clusters):
        clusters = [
            (", ".join(cluster.keywords[:3]), *(format_amount(count) for count in cluster.counts))
            for cluster in survey.clusters.clusters[:NUM_CLUSTERS]
        ]
        print_table(f"clusters that differ most ({survey.clusters.origin})", ["cluster", *survey.sides], clusters)
    print_lines(*survey.notes)


def _percent(share: float) -> str:
    return format_share(share, 1)


def choose(words: Sequence[str]) -> tuple[Callable[..., Any], list[str], str]:
    """Return what does the work of ``modeclip curate`` with some words, its words, and what help calls it."""
    place = next((place for place, word in enumerate(words[:2]) if word in METHODS or word == "compare"), None)
    if place is None:
        return curate, list(words), "modeclip curate"
    rest = [word for index, word in enumerate(words) if index != place]
    if words[place] == "compare":
        command = compare
    else:
        method = load_method(words[place])
        command = command_of(briefly(method) if {"-h", "--help"} & set(rest) else method)
    return command, rest, f"modeclip curate {' '.join(words[: place + 1])}"


def briefly(method: type[Any]) -> type[Any]:
    """Return a method's config as help shows it: without what belongs to other commands, such as all of training."""
    others = [
        one for one in fields(method) if isinstance(one.default_factory, type) and is_dataclass(one.default_factory)
    ]
    content: dict[str, Any] = {one.name: field(default_factory=one.default_factory) for one in others}
    content["__annotations__"] = {one.name: Suppress[one.default_factory] for one in others}  # type: ignore
    content |= {"__module__": method.__module__, "__doc__": method.__doc__}
    return dataclass(frozen=True, kw_only=True)(type(method.__name__, (method,), content))


def command_of(config: type[Any]) -> Callable[..., None]:
    """Return the command of a method, whose options are its settings and those that all methods share."""

    def command(
        catalog: CatalogPath,
        method: Any,
        *,
        column: Column = None,
        where: Where = (),
        mask: Mask = None,
        dry_run: Annotated[bool, arg(help="Show all of it, but add no column.")] = False,
        out: Annotated[
            Path | None, arg(help="Folder of curate.html; default: curation/NAME beside a local catalog.")
        ] = None,
        ray: Ray = False,
        as_json: AsJson = False,
    ) -> None:
        from modeclip.curation.curating import curate as run_curate
        from modeclip.curation.explaining import explain
        from modeclip.data.catalog import Catalog
        from modeclip.data.selection import Selection
        from modeclip.pages.curate_page import write_curation

        opened, selection = Catalog.open(catalog), Selection(where=where, mask=mask)
        folder = folder_of(opened, out, f"{column or method.method}{'-dry-run' if dry_run else ''}")
        curated = run_curate(opened, method, name=column, selection=selection, dry_run=dry_run, ray=ray)
        explanation = explain(curated, seed=getattr(method, "seed", 0))
        explanation.save(folder)
        page = write_curation(opened, explanation, folder)
        if as_json:
            print_json(asdict(explanation) | {"page": str(page)})
            return
        print_explanation(explanation)
        print_lines(f"page: {page}")

    command.__doc__ = config.__doc__
    command.__annotations__["method"] = OmitArgPrefixes[config]  # type: ignore[misc, valid-type]
    return command
