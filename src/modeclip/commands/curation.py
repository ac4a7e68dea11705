"""The command that decides which pairs are trained on: curate, with a method behind the catalog.

modeclip curate CATALOG METHOD [options]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.curation.curating import METHODS, load_method
from modeclip.errors import unknown
from modeclip.system.options import AsJson, CatalogPath, Mask, Ray, Where

Column = Annotated[
    str | None,
    arg(help="What the names of the new columns begin with: NAME_kept, NAME_cause, ...; default: the method."),
]


def curate(
    catalog: CatalogPath,
    method: Positional[Annotated[str, arg(metavar="METHOD", help=f"One of {', '.join(METHODS)}.")]],
) -> None:
    """Decide which pairs of a catalog are trained on, and show why; CATALOG METHOD --help tells the settings."""
    del catalog
    raise unknown("method", method, METHODS)


def choose(words: Sequence[str]) -> tuple[Callable[..., Any], list[str], str]:
    """Return what does the work of ``modeclip curate`` with some words, its words, and what help calls it."""
    place = next((place for place, word in enumerate(words[:2]) if word in METHODS), None)
    if place is None:
        return curate, list(words), "modeclip curate"
    rest = [word for index, word in enumerate(words) if index != place]
    return command_of(load_method(words[place])), rest, f"modeclip curate {' '.join(words[: place + 1])}"


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
        from modeclip.data.catalog import Catalog
        from modeclip.data.selection import Selection

        selection = Selection(where=where, mask=mask)
        curated = run_curate(Catalog.open(catalog), method, name=column, selection=selection, dry_run=dry_run, ray=ray)
        del curated, out, as_json

    command.__doc__ = config.__doc__
    command.__annotations__["method"] = OmitArgPrefixes[config]  # type: ignore[misc, valid-type]
    return command
