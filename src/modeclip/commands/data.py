"""The commands that make a catalog and work on it: index, check, uids, embed, cluster, atlas.

Each adds what it computes to the catalog as columns, and computes only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, PositionalRequiredArgs, arg

from modeclip.clustering.diagnostics import DiagnoseConfig
from modeclip.clustering.embedding import EmbedConfig
from modeclip.clustering.fitting import ClusterConfig
from modeclip.data.checks import CheckConfig
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.system.console import print_json, print_lines, print_table
from modeclip.system.options import AsJson, CatalogPath, Mask, Ray, Where
from modeclip.system.paths import RunPaths


def index(
    data: PositionalRequiredArgs[OmitArgPrefixes[DataConfig]],
    out: Annotated[str, arg(help="Folder, or address in an object store, of the catalog.")] = "catalog",
    *,
    replace: Annotated[bool, arg(help="Replace what the catalog has by this source, instead of adding to it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a catalog of image-caption pairs from whatever you have, or add the pairs that are new since then."""
    from modeclip.data.indexing import index as run_index

    result = run_index(data, out, replace=replace)
    if as_json:
        print_json(asdict(result) | {"catalog": out})
        return
    rows = [("pairs", f"{result.num_samples:,}"), ("of them new", f"{result.num_added:,}")]
    rows += [("distinct captions", f"{result.num_captions:,}")]
    rows += [(f"task {name}", f"{images:,} in {classes:,} classes") for name, (classes, images) in result.tasks.items()]
    rows += [(f"skipped: {cause}", f"{count:,}") for cause, count in sorted(result.skipped.items())]
    print_table(f"{out}, read as {result.kind}", ["", "count"], rows)


def check(
    catalog: CatalogPath,
    config: Annotated[OmitArgPrefixes[CheckConfig], arg(name="checking")],
    out: Annotated[Path | None, arg(help="Folder for check.html and contact.png; default: none are drawn.")] = None,
    *,
    where: Where = (),
    mask: Mask = None,
    deep: Annotated[
        bool, arg(help="Hash all files of a run, catalog, bundle or model; exit code 2 if one is damaged.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report what a catalog holds and what is wrong with it; the exit code is 1 if something must be mended."""
    if deep:
        _check_files(catalog, as_json)
        return
    from modeclip.data.catalog import Catalog
    from modeclip.data.checks import check as run_check
    from modeclip.data.selection import Selection
    from modeclip.pages.check_page import write_check

    opened = Catalog.open(catalog)
    opened = Selection(where=where, mask=mask).part_of(opened)
    result = run_check(opened, config, tokenize=lambda *texts, **options: _tokenizer()(*texts, **options))
    pages = write_check(opened, result, out, config.seed) if out else ()
    if as_json:
        print_json(result.to_json())
    else:
        title = f"{result.num_pairs:,} pairs, {result.num_captions:,} captions, {result.num_decoded:,} images decoded"
        columns = ["finding", "severity", "pairs", "share", "first", "what to do"]
        if result.findings:
            print_table(title, columns, [list(row) for row in result.rows()])
        else:
            print_lines(f"{title}: no problems found")
        for page in pages:
            print_lines(page)
    if result.has_errors:
        raise SystemExit(1)


def _check_files(path: str, as_json: bool) -> None:
    """Print which files are not as they were written, and what to do."""
    from modeclip.pipeline.verifying import verify

    found = verify(path)
    damaged = sum(one.state == "damaged" for one in found)
    if as_json:
        print_json({"path": path, "damaged": damaged, "files": [asdict(one) for one in found]})
    else:
        whole = sum(one.state == "whole" for one in found)
        title = f"{path}: {whole:,} files are as they were written, {damaged:,} are damaged"
        rows = [
            (one.file, f"{one.state}{': ' if one.detail else ''}{one.detail}", one.advice)
            for one in found
            if one.state != "whole"
        ]
        if rows:
            print_table(title, ["file", "state", "what to do"], rows)
        else:
            print_lines(title)
    if damaged:
        raise SystemExit(2)


@cache
def _tokenizer() -> Callable[..., Any]:
    """Return CLIP's tokenizer, which nearly every open_clip model uses."""
    from modeclip.models.clip import load_clip

    return load_clip("modeclip-icon", seed=0).tokenizer  # type: ignore[no-any-return]


def uids(
    catalog: CatalogPath,
    *,
    out: Annotated[Path | None, arg(help="Write the ids of the chosen pairs to this .npy.")] = None,
    expert: Annotated[int | None, arg(help="Choose the pairs of an expert.")] = None,
    where: Where = (),
    mask: Mask = None,
    keep: Annotated[Path | None, arg(help="Read ids from this .npy and mark their pairs in a column.")] = None,
    into: Annotated[str, arg(help="Name of that column of booleans.")] = "kept",
    column: Annotated[str, arg(help="Column of ids; without it the id is the MD5 of the key.")] = "uid",
    as_json: AsJson = False,
) -> None:
    """Exchange selections of pairs as DataComp does: sorted ids of 128 bits in a .npy file."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.data.subsets import mark_uids, uids_of, write_uids

    opened = Catalog.open(catalog)
    done: dict[str, object] = {}
    if keep is not None:
        found = mark_uids(opened, keep, into, column)
        done |= {"ids": found.num_uids, into: int(found.mask.sum()), "unknown": found.num_unknown}
    if out is not None:
        selection = Selection(where=(*where, *([] if expert is None else [f"expert={expert}"])), mask=mask)
        rows = selection.rows(opened)
        write_uids(out, uids_of(opened, rows, column))
        done |= {"written": len(rows), "file": str(out)}
    if not done:
        raise ModeclipError("uids: nothing to do; give --out FILE.npy to write ids, or --keep FILE.npy to read them")
    if as_json:
        print_json(done)
    else:
        print_table(catalog, ["uids", "count"], [(name, str(value)) for name, value in done.items()])


def embed(
    catalog: CatalogPath,
    config: Annotated[OmitArgPrefixes[EmbedConfig], arg(name="embedding")],
    *,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Turn the captions of a catalog into vectors, its column caption_embedding."""
    from modeclip.clustering.embedding import embed as run_embed
    from modeclip.data.catalog import Catalog

    result = run_embed(Catalog.open(catalog), config, ray=ray)
    if as_json:
        print_json(asdict(result))
    else:
        print_lines(
            f"{catalog}: {result.num_captions:,} captions as {result.dimension} numbers by {result.encoder}"
            + ("" if result.num_distinct is None else f"; {result.num_distinct:,} went through it")
            + (f"; {result.num_zero:,} are zero, since it knows none of their words" if result.num_zero else "")
        )


def cluster(
    catalog: CatalogPath,
    config: Annotated[OmitArgPrefixes[ClusterConfig], arg(name="clustering")],
    out: Annotated[Path | None, arg(help="Folder of the clustering; default: clusters beside the catalog.")] = None,
    *,
    diagnosis: OmitArgPrefixes[DiagnoseConfig],
    where: Where = (),
    mask: Mask = None,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Split a catalog into experts and show what came out: sizes, key words, pictures, false negatives."""
    from modeclip.clustering.diagnostics import diagnose
    from modeclip.clustering.fitting import cluster as run_cluster
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.pages.atlas import write_atlas

    opened = Catalog.open(catalog)
    if out is None:
        if "://" in catalog:
            raise ModeclipError("cluster: the catalog lies in an object store; give --out FOLDER on this machine")
        out = RunPaths(folder=Path(opened.path).parent).clusters
    selection = Selection(where=where, mask=mask)
    result = run_cluster(opened, config, selection=selection, ray=ray)
    result.save(out)
    found = diagnose(opened, result, config, diagnosis, selection=selection)
    found.save(out)
    page = write_atlas(opened, result, out / "atlas.html", found)
    stale = _stale_models(Path(opened.path).parent)
    if as_json:
        content = {"experts": [asdict(card) for card in result.experts], "imbalance": result.imbalance, "stale": stale}
        print_json(content | {"objective": result.objective, "diagnostics": asdict(found), "folder": str(out)})
        return
    rows = [
        (str(card.index), f"{card.size:,}", str(card.num_fine), f"{card.range:.3f}", ", ".join(card.keywords))
        for card in result.experts
    ]
    title = f"{len(result.fine):,} fine clusters, objective {result.objective:.4f}, imbalance {result.imbalance:.2f}"
    print_table(title, ["expert", "pairs", "fine clusters", "range", "key words"], rows)
    for table in found.tables():
        print_table(*table)
    if found.negatives:
        print_lines(found.negatives.verdict)
    if stale:
        models = ", ".join(f"{name} ({why})" for name, why in stale.items())
        print_lines(
            f"stale models: {models}; modeclip train-experts --resume stale trains these anew and keeps the others"
        )
    print_lines(f"clustering: {out}", f"atlas: {page}")


def atlas(
    run: Positional[Annotated[Path, arg(help="Folder of a run, with its catalog and clusters.")]],
    out: Annotated[Path | None, arg(help="The Parquet file; default: atlas/atlas.parquet in the run.")] = None,
) -> None:
    """Write the atlas of a run as a table with places, captions and pictures, which embedding-atlas (0.26) opens."""
    from modeclip.serving.atlas import Atlas

    path = Atlas(run).write_table(out)
    print_lines(f"atlas: {path}", f"open it with: embedding-atlas {path} --x x --y y --text text --image image")


def _stale_models(run: Path) -> dict[str, str]:
    """Return why finished models of a catalog's run no longer fit it, by name."""
    from modeclip.training.status import status

    models = RunPaths(folder=run).models
    if not any(models.glob("*/job.json")):
        return {}
    return {row.name: row.note for row in status(models) if row.state == "stale"}
