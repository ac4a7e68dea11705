"""The command that finds images by words or by a picture: search, and what makes and changes its index.

modeclip search INDEX TEXT [options]
modeclip search build CATALOG --model MODEL --out INDEX
modeclip search add INDEX CATALOG
modeclip search remove INDEX --where CONDITION
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.search.query import SearchConfig
from modeclip.system.console import print_json, print_lines, print_table
from modeclip.system.options import AsJson, CatalogPath, Mask, Ray, UserEncoder, Where

if TYPE_CHECKING:
    from modeclip.search.index import Index
    from modeclip.search.query import Added, Found

CAPTION_WIDTH = 60
"""Letters of a caption in the table."""
SHEET_COLUMNS = 5
IndexPath = Positional[
    Annotated[str, arg(metavar="INDEX", help="Folder that `modeclip search build` wrote, or its address (s3://...).")]
]
Trust = Annotated[bool, arg(help="Run the bundle's own encoder, if that is Python code.")]


def search(
    index: IndexPath,
    text: Positional[Annotated[str | None, arg(metavar="TEXT", help="Words that the images should fit.")]] = None,
    *,
    image: Annotated[Path | None, arg(help="A picture that they should resemble; with a text, both count.")] = None,
    image_weight: Annotated[float, arg(help="Share of the picture where a text is given too, in [0, 1].")] = 0.5,
    negatives: Annotated[
        tuple[str, ...], arg(name="not", metavar="TEXT", help="Texts that the images should not fit.")
    ] = (),
    negative_weight: Annotated[float, arg(help="Weight of each of these texts, 0 or more.")] = 0.5,
    expert: Annotated[
        str | None, arg(help="The one expert that answers, by name; default: as the text is routed.")
    ] = None,
    count: Annotated[int, arg(help="Images to show.")] = 10,
    least_strength: Annotated[
        float, arg(help="Leave out hits that are weaker than this share of known pairs, in [0, 1].")
    ] = 0.0,
    hybrid: Annotated[bool, arg(help="Rank by the words of the captions too.")] = False,
    where: Where = (),
    sheet: Annotated[Path | None, arg(help="Write the pictures that were found as one PNG.")] = None,
    encoder: UserEncoder = None,
    trust_encoder: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Find images by words, by a picture or both, in an index; `modeclip search build` makes one."""
    from modeclip.data.images import open_picture
    from modeclip.search.index import Index
    from modeclip.search.query import Query

    query = Query(
        text=text,
        image=None if image is None else open_picture(image),
        image_weight=image_weight,
        negatives=negatives,
        negative_weight=negative_weight,
        expert=expert,
    )
    opened = Index.open(index, encoder=encoder, trust_encoder=trust_encoder)
    found = opened.search(query, count=count, where=where, least_strength=least_strength, hybrid=hybrid)
    if sheet is not None and found.hits:
        _write_sheet(opened, found, sheet)
    if as_json:
        print_json(asdict(found) | ({"sheet": str(sheet)} if sheet is not None and found.hits else {}))
        return
    _print_found(found)
    if sheet is not None and found.hits:
        print_lines(f"pictures: {sheet}")


def build(
    catalog: CatalogPath,
    config: Annotated[OmitArgPrefixes[SearchConfig], arg(name="searching")],
    *,
    model: Annotated[str, arg(help="A bundle, BUNDLE#expert-1, a model folder, NAME@TAG or hf-hub:...")],
    out: Annotated[str, arg(help="Folder of the index, here or in an object store (s3://...).")],
    where: Where = (),
    mask: Mask = None,
    encoder: UserEncoder = None,
    trust_encoder: Trust = False,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Make an index of a catalog's images, or finish one, or bring it up to date."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.search.asking import SearchModel
    from modeclip.search.index import Index

    opened, selection = Catalog.open(catalog), Selection(where=where, mask=mask)
    asked = SearchModel.open(model, encoder=encoder, trust_encoder=trust_encoder)
    index = Index.build(opened, asked, out, config, selection=selection, ray=ray)
    facts = {"index": index.folder, "images": len(index), "experts": list(index.model.names)}
    if as_json:
        print_json(facts | {"approximate": None if index.approximate is None else asdict(index.approximate)})
        return
    how = "every search compares all of them"
    if index.approximate is not None:
        found = index.approximate
        how = (
            f"a search looks at {found.looked_at} of {found.partitions} parts and finds {100 * found.recall:.1f} % "
            f"of the ten best, by {found.queries:,} captions"
        )
    print_lines(f"index: {index.folder}", f"{len(index):,} images, {len(index.model.names)} experts; {how}")


def add(
    index: IndexPath,
    catalog: CatalogPath,
    *,
    where: Where = (),
    mask: Mask = None,
    encoder: UserEncoder = None,
    trust_encoder: Trust = False,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Add the images of a catalog to an index, and encode those anew that have changed."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.search.index import Index

    opened = Index.open(index, encoder=encoder, trust_encoder=trust_encoder)
    added = opened.add(Catalog.open(catalog), selection=Selection(where=where, mask=mask), ray=ray)
    if as_json:
        print_json(asdict(added))
        return
    print_lines(_added(added))


def remove(
    index: IndexPath,
    *,
    where: Where = (),
    encoder: UserEncoder = None,
    trust_encoder: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Remove the images from an index for which conditions hold; the catalog keeps them."""
    from modeclip.search.index import Index

    opened = Index.open(index, encoder=encoder, trust_encoder=trust_encoder)
    count = opened.remove(where)
    left = len(Index.open(index, opened.model))
    if as_json:
        print_json({"removed": count, "images": left})
        return
    print_lines(f"removed {count:,} images, {left:,} are left")


def choose(words: Sequence[str]) -> tuple[Callable[..., Any], list[str], str]:
    """Return what does the work of ``modeclip search`` with some words, its words, and what help calls it."""
    others: dict[str, Callable[..., Any]] = {"build": build, "add": add, "remove": remove}
    if words and words[0] in others and not _is_index(words[0]):
        return others[words[0]], list(words[1:]), f"modeclip search {words[0]}"
    return search, list(words), "modeclip search"


def _is_index(folder: str) -> bool:
    """Whether a folder holds an index, or the rows of one that is half built, as `modeclip.search.index` names them."""
    return any(Path(folder, name).exists() for name in ("index.json", "images.lance"))


def _write_sheet(index: Index, found: Found, path: Path) -> None:
    """Draw the pictures that were found, in their order, with their captions."""
    from modeclip.pages.check_page import Tile, write_sheet

    tiles = [
        Tile(row=hit.row, key=hit.key, caption=f"{100 * hit.strength:.0f} % {hit.caption}", image=picture, cause="")
        for hit, picture in zip(found.hits, index.pictures(found.hits), strict=True)
    ]
    write_sheet(tiles, path, columns=SHEET_COLUMNS)


def _print_found(found: Found) -> None:
    """Print the hits as a table, with what each expert adds where there are several."""
    several = len(found.experts) > 1
    rows = [
        (
            f"{rank}",
            f"{hit.score:.3f}",
            f"{100 * hit.strength:.0f} %",
            *([" ".join(f"{part:.3f}" for part in hit.parts)] if several else []),
            hit.caption if len(hit.caption) <= CAPTION_WIDTH else f"{hit.caption[: CAPTION_WIDTH - 1]}…",
            hit.path or hit.key,
        )
        for rank, hit in enumerate(found.hits, 1)
    ]
    how = "" if found.exact else ", approximately"
    title = f"best of {found.num_searched:,} images{how}"
    print_table(title, ["", "score", "strength", *(["by expert"] if several else []), "caption", "image"], rows)
    if several:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(found.experts, found.weights, strict=True))
        print_lines(f"experts: {weights}")
    print_lines("strength: share of known pairs (captions with their own images) that fit less")


def _added(added: Added) -> str:
    return (
        f"{added.num_new:,} images are new, {added.num_changed:,} have changed, {added.num_moved:,} lie in other rows, "
        f"{added.num_edited:,} have other columns, {added.num_same:,} were there; the index has {added.num_rows:,}"
    )
