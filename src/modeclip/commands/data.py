"""The commands of the data half of the command line: index, check, uids, embed, cluster. Parse, call, print.

They are steps of the same catalog: each adds what it computes as columns, and leaves out what is there already.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, PositionalRequiredArgs, arg

from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.system.console import print_json, print_table

AsJson = Annotated[bool, arg(name="json", help="Print JSON for machines instead of a table.")]
CatalogPath = Positional[
    Annotated[str, arg(help="What `modeclip index` wrote: a folder, catalog.lance in it, or an address (s3://...).")]
]
Ray = Annotated[
    bool, arg(help="Work on the Ray cluster of RAY_ADDRESS, one that runs on this machine, or a new one on it.")
]


@dataclass(frozen=True, kw_only=True)
class DataOptions(DataConfig):
    """Where image-caption pairs come from, and which of them are kept for evaluation."""

    def __post_init__(self) -> None:
        """Leave the checks to the `DataConfig` that is made of it, whose errors are one line."""


def index(
    data: PositionalRequiredArgs[OmitArgPrefixes[DataOptions]],
    out: Annotated[str, arg(help="Folder, or address in an object store, of the catalog.")] = "catalog",
    *,
    replace: Annotated[bool, arg(help="Put the source in the place of what the catalog has, not behind it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a catalog of image-caption pairs from whatever you have, or add what has come since."""
    from modeclip.data.indexing import index as run_index

    result = run_index(DataConfig(**asdict(data)), out, replace=replace)
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
    out: Annotated[Path | None, arg(help="Folder for check.html and contact.png; default: none are drawn.")] = None,
    *,
    decode_all: Annotated[bool, arg(help="Decode all images instead of a random sample.")] = False,
    decode_samples: Annotated[int, arg(help="Images in that sample.")] = 10_000,
    duplicate_images: Annotated[bool, arg(help="Look for equal images by reading all, not by their hashes.")] = False,
    context_length: Annotated[int, arg(help="Tokens that the text tower reads; longer captions are cut.")] = 77,
    seed: Annotated[int, arg(help="Decides the samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Say what a catalog holds and what is wrong with it; exit code 1 if something must be mended."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.checks import CheckConfig
    from modeclip.data.checks import check as run_check
    from modeclip.pages.check_page import write_check

    opened = Catalog.open(catalog)
    config = CheckConfig(
        decode_all=decode_all,
        decode_samples=decode_samples,
        duplicate_images=duplicate_images,
        context_length=context_length,
        seed=seed,
    )
    result = run_check(opened, config)
    pages = write_check(opened, result, out, seed) if out else ()
    if as_json:
        print_json(result.to_json())
    else:
        title = f"{result.num_pairs:,} pairs, {result.num_captions:,} captions, {result.num_decoded:,} images decoded"
        columns = ["finding", "severity", "pairs", "share", "first", "what to do"]
        if result.findings:
            print_table(title, columns, [list(row) for row in result.rows()])
        else:
            print(f"{title}: nothing to complain of")
        for page in pages:
            print(page)
    if result.has_errors:
        raise SystemExit(1)


def uids(
    catalog: CatalogPath,
    *,
    out: Annotated[Path | None, arg(help="Write the ids of the chosen pairs to this .npy.")] = None,
    expert: Annotated[int | None, arg(help="Choose the pairs of an expert.")] = None,
    mask: Annotated[str | None, arg(help="Choose the pairs that a column of booleans marks.")] = None,
    keep: Annotated[Path | None, arg(help="Read ids from this .npy and mark their pairs in the column `kept`.")] = None,
    column: Annotated[str, arg(help="Column of ids; without it the id is the MD5 of the key.")] = "uid",
    as_json: AsJson = False,
) -> None:
    """Exchange selections of pairs as DataComp does: sorted ids of 128 bits in a .npy file."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.subsets import match_uids, uids_of, write_uids

    opened = Catalog.open(catalog)
    done: dict[str, object] = {}
    if keep is not None:
        found = match_uids(opened, keep, column)
        opened.add_columns({"kept": found.mask}, facts={"uids": str(keep), "ids": found.origin})
        done |= {"ids": found.num_uids, "kept": int(found.mask.sum()), "unknown": found.num_unknown}
    if out is not None:
        rows = opened.select(mask=mask, **({} if expert is None else {"expert": expert}))
        write_uids(out, uids_of(opened, rows, column))
        done |= {"written": len(rows), "file": str(out)}
    if not done:
        raise ModeclipError("uids: nothing to do; give --out FILE.npy to write ids, --keep FILE.npy to read them")
    if as_json:
        print_json(done)
    else:
        print_table(catalog, ["uids", "count"], [(name, str(value)) for name, value in done.items()])


def embed(
    catalog: CatalogPath,
    encoder: Annotated[
        str,
        arg(
            help="auto, minilm, simcse, simcse:FOLDER, tfidf, model2vec:FOLDER, clip:MODEL, clip-image:MODEL, "
            "clip-both:MODEL, timm:NAME, MODULE:ATTRIBUTE, a sentence-transformers folder or hub id."
        ),
    ] = "auto",
    *,
    batch_size: Annotated[int | None, arg(help="Rows of a forward pass; 512 on a GPU.")] = None,
    dimension: Annotated[int, arg(help="Dimensions of tfidf.")] = 256,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Turn the captions of a catalog into vectors, its column caption_embedding."""
    from modeclip.clustering.embedding import EmbedConfig
    from modeclip.clustering.embedding import embed as run_embed
    from modeclip.data.catalog import Catalog

    config = EmbedConfig(encoder=encoder, dimension=dimension)
    config = config if batch_size is None else replace(config, batch_size=batch_size)
    result = run_embed(Catalog.open(catalog), config, ray=ray)
    if as_json:
        print_json(asdict(result))
    else:
        print(
            f"{catalog}: {result.num_captions:,} captions as {result.dimension} numbers by {result.encoder}; "
            f"{result.num_distinct:,} went through it"
        )


def cluster(
    catalog: CatalogPath,
    fine: Annotated[int, arg(help="Fine clusters, M.")] = 1024,
    experts: Annotated[int, arg(help="Experts, K.")] = 4,
    out: Annotated[Path | None, arg(help="Folder of the clustering; default: clusters beside the catalog.")] = None,
    *,
    overlap: Annotated[int, arg(help="Experts that each fine cluster belongs to.")] = 1,
    max_size_ratio: Annotated[float | None, arg(help="Largest fine cluster by the mean, at fitting.")] = 1.5,
    max_expert_ratio: Annotated[float | None, arg(help="Most fine clusters of an expert by the mean.")] = 1.25,
    fit_samples: Annotated[int, arg(help="Pairs, drawn at random, that the fine clusters are fitted on.")] = 2_000_000,
    sweep_experts: Annotated[tuple[int, ...], arg(help="Numbers of experts to compare.")] = (2, 4, 8, 16, 32),
    sweep_fine: Annotated[tuple[int, ...], arg(help="Numbers of fine clusters to compare.")] = (),
    stability: Annotated[int, arg(help="Seeds to compare, 2 or more; 0: none.")] = 0,
    batch_size: Annotated[int, arg(help="Batch in which false negatives are counted: the one of training.")] = 256,
    seed: Annotated[int, arg(help="Decides samples and starts.")] = 0,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Split a catalog into experts and show what came out: sizes, key words, pictures, false negatives."""
    from modeclip.clustering.diagnostics import DiagnoseConfig, diagnose
    from modeclip.clustering.fitting import ClusterConfig
    from modeclip.clustering.fitting import cluster as run_cluster
    from modeclip.data.catalog import Catalog
    from modeclip.pages.atlas import write_atlas

    opened = Catalog.open(catalog)
    if out is None:
        if "://" in catalog:
            raise ModeclipError("cluster: the catalog lies in an object store; give --out FOLDER on this machine")
        out = Path(opened.path).parent / "clusters"
    config = ClusterConfig(
        num_fine=fine,
        num_experts=experts,
        overlap=overlap,
        max_size_ratio=max_size_ratio,
        max_expert_ratio=max_expert_ratio,
        fit_samples=fit_samples,
        seed=seed,
    )
    what = DiagnoseConfig(experts=sweep_experts, fine=sweep_fine, num_seeds=stability, batch_size=batch_size, seed=seed)
    result = run_cluster(opened, config, ray=ray)
    result.save(out)
    found = diagnose(opened, result, config, what)
    found.save(out)
    page = write_atlas(opened, result, out / "atlas.html", found)
    if as_json:
        content = {"experts": [asdict(card) for card in result.experts], "imbalance": result.imbalance}
        print_json(content | {"objective": result.objective, "diagnostics": asdict(found), "folder": str(out)})
        return
    rows = [
        (str(card.index), f"{card.size:,}", str(card.num_fine), f"{card.range:.3f}", ", ".join(card.keywords))
        for card in result.experts
    ]
    title = f"{len(result.fine):,} fine clusters, objective {result.objective:.4f}, imbalance {result.imbalance:.2f}"
    print_table(title, ["expert", "pairs", "fine clusters", "range", "key words"], rows)
    for table in found.rows():
        print_table(*table)
    if found.negatives:
        print(found.negatives.verdict)
    print(f"clustering: {out}\natlas: {page}")
