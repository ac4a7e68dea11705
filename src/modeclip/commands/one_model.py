"""The commands that make one model of many, and hand it on: upcycle, distill, export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.adapting.distilling import DistillConfig, Taught
from modeclip.adapting.exporting import ExportConfig
from modeclip.adapting.model_card import CARD_FILE
from modeclip.adapting.upcycling import RESULT_FILE, UpcycleConfig, Upcycled
from modeclip.mixture.manifest import MANIFEST_FILE
from modeclip.system.console import log, print_json, print_lines, print_table
from modeclip.system.options import AsJson, CatalogPath, Mask, UserEncoder, Where

if TYPE_CHECKING:
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection

Source = Positional[
    Annotated[
        str,
        arg(
            help="A plain CLIP (folder, BUNDLE#seed, NAME@TAG, hf-hub:...), a bundle whose experts were trained with "
            "--trainable ffn, or with --add a CLIP-MoE."
        ),
    ]
]
Added = Annotated[
    tuple[str, ...],
    arg(
        help="Models that become further experts of the CLIP-MoE: BUNDLE#expert-1, a folder, or another CLIP-MoE of "
        "the same plain model. --where selects the pairs that the expert is for. Nothing is trained without --trains."
    ),
]


def upcycle(
    model: Source,
    catalog: CatalogPath,
    config: Annotated[OmitArgPrefixes[UpcycleConfig], arg(name="upcycling")],
    *,
    out: Annotated[Path, arg(help="Folder of the CLIP-MoE (model) and of all that leads to it.")],
    add: Added = (),
    where: Where = (),
    mask: Mask = None,
    plan: Annotated[bool, arg(help="Say what the trainings cost, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make one CLIP-MoE: of a CLIP in stages of training (DMU), or of a bundle's experts; then train its routers."""
    from modeclip.adapting.upcycling import plan_upcycling
    from modeclip.adapting.upcycling import upcycle as run_upcycling
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.training.costs import COLUMNS

    pairs, selection = Catalog.open(catalog), Selection(where=where, mask=mask)
    if plan:
        costs = plan_upcycling(model, pairs, config, out=out, add=add, selection=selection)
        if as_json:
            print_json(costs.to_json())
            return
        print_table("plan: trainings, one after the other", COLUMNS, costs.trainings.rows() if costs.trainings else [])
        print_lines(costs.embedding)
        if costs.trainings and costs.trainings.problem:
            log(costs.trainings.problem)
        return
    result = run_upcycling(model, pairs, config, out=out, add=add, selection=selection)
    page = _write_page(result, pairs, out, selection)
    if as_json:
        print_json(asdict(result) | {"page": str(page)})
        return
    _show(result)
    print_lines(f"page: {page}")


def _write_page(result: Upcycled, pairs: Catalog, out: Path, selection: Selection) -> Path:
    """Write the page of the routers, unless it is there; topics are clusters, of the stages or a bundle, or words."""
    from modeclip.adapting.tracing import TraceConfig, trace
    from modeclip.pages.router_page import PAGE_FILE, write_routers

    page = out / PAGE_FILE
    if page.is_file() and page.stat().st_mtime_ns >= (out / RESULT_FILE).stat().st_mtime_ns:
        return page
    columns = [stage.column for stage in result.stages[:2]]  # of later stages, most are too small for a sample
    columns += ["fine_cluster"] if Path(result.model, MANIFEST_FILE).is_file() else []
    topics = next((column for column in columns[::-1] if column in pairs.columns), None)
    config = TraceConfig(topics=topics)
    found = trace(pairs, result.folder, config, selection=selection, experts=result.experts)
    return write_routers(found, out, name=out.resolve().name)


def distill(
    teacher: Positional[
        Annotated[
            str, arg(help="A bundle, whose experts are routed for each caption, a CLIP-MoE, or any model with weights.")
        ]
    ],
    catalog: CatalogPath,
    config: Annotated[OmitArgPrefixes[DistillConfig], arg(name="distillation")],
    *,
    student: Annotated[
        str, arg(help="Model to train: a name (random weights), NAME@TAG, hf-hub:..., a folder, or BUNDLE#seed.")
    ],
    out: Annotated[Path, arg(help="Folder of the student.")],
    where: Where = (),
    mask: Mask = None,
    encoder: UserEncoder = None,
    ray: Annotated[
        bool, arg(help="Run the teacher on the Ray cluster of RAY_ADDRESS, or one that runs here, or a new one.")
    ] = False,
    teacher_only: Annotated[
        bool,
        arg(
            help="Run the teacher, write OUT/job.json and stop; torchrun ... modeclip train OUT/job.json trains in "
            "many processes."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Teach one CLIP what a mixture, a CLIP-MoE or another CLIP knows; the teacher runs once for all students."""
    from modeclip.adapting.distilling import distill as run_distillation
    from modeclip.adapting.distilling import plan_distillation, teach
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection

    pairs, selection = Catalog.open(catalog), Selection(where=where, mask=mask)
    given = {"student": student, "out": out, "selection": selection, "encoder": encoder}
    if teacher_only:
        job, work = plan_distillation(teacher, pairs, config, **given)  # type: ignore[arg-type]
        vectors = teach(pairs, work, ray=ray)
        path = job.save()
        if as_json:
            print_json({"vectors": asdict(vectors), "job": str(path)})
        else:
            print_lines(*_words_of(vectors), f"student: modeclip train {path}")
        return
    result = run_distillation(teacher, pairs, config, ray=ray, **given)  # type: ignore[arg-type]
    if as_json:
        print_json(asdict(result))
        return
    print_lines(
        *_words_of(result.vectors),
        f"student: {result.samples:,} samples of {result.num_pairs:,} pairs in {result.seconds:.0f} s; {result.loss} "
        f"{result.first_loss:.4f}, at the end {result.last_loss:.4f}",
        f"model: {result.folder}",
    )


def _words_of(vectors: Taught) -> tuple[str, str]:
    """Return what is to be said of a teacher's vectors."""
    kept = f"{vectors.computed:,} pairs in {vectors.seconds:.0f} s" if vectors.computed else "kept, no pair was run"
    return (
        f"teacher: {vectors.models} x {vectors.dimension} numbers, {vectors.bytes_per_pair:,} bytes a pair; {kept}",
        f"columns: {vectors.columns}_images, _texts and _weights; train --teacher {vectors.columns} reads them too",
    )


def _show(result: Upcycled) -> None:
    """Print what an upcycling has made."""
    clusters = {stage.name: stage for stage in result.stages}
    rows = []
    for training in result.trainings:
        stage = clusters.get(training.name)
        of_clusters = (f"{stage.num_clusters:,}", f"{stage.num_merged:,}") if stage else ("", "")
        losses = (f"{training.first_loss:.3f}", f"{training.last_loss:.3f}")
        rows.append((training.name, *of_clusters, f"{training.samples:,}", *losses, f"{training.seconds:.0f}"))
    if rows:
        columns = ["training", "clusters", "merged", "samples", "first loss", "last loss", "seconds"]
        print_table(f"{result.num_pairs:,} pairs", columns, rows, in_parts=True)
    print_lines(
        f"experts: {', '.join(result.experts)}; {result.top_k} of them for a token",
        f"parameters: {result.parameters:,}, of which a token meets {result.active_parameters:,}",
        f"model: {result.folder}",
    )


Exportable = Positional[
    Annotated[
        str,
        arg(
            help="A model (folder, BUNDLE#expert-1, NAME@TAG, hf-hub:...), a CLIPModel folder of transformers, "
            "or for ONNX a bundle, whose graphs take the routing weights."
        ),
    ]
]


def export(
    model: Exportable,
    config: Annotated[OmitArgPrefixes[ExportConfig], arg(name="export")],
    *,
    out: Annotated[Path, arg(help="Folder of the export: new, empty, or an earlier export.")],
    tasks: Annotated[str | None, arg(help="Catalog of held-out zero-shot tasks, such as tasks.lance of a run.")] = None,
    where: Where = (),
    mask: Mask = None,
    as_json: AsJson = False,
) -> None:
    """Export a model to ONNX, to CLIPModel of Hugging Face or to open_clip, with its parity and a model card."""
    from modeclip.adapting.exporting import export as run_export
    from modeclip.data.selection import Selection

    result = run_export(model, config, out=out, tasks=tasks, selection=Selection(where=where, mask=mask))
    if as_json:
        print_json(asdict(result))
        return
    rows = [
        (name, f"{found['max_abs']:.1e}", f"{found['min_cosine']:.6f}")
        for name, found in result.parity.items()
        if isinstance(found, dict) and "min_cosine" in found
    ]
    print_table("compared with the model", ["", "largest difference", "least cosine"], rows)
    if result.graphs:
        low = [
            (
                f"{graph.tower}.{graph.kind}.onnx",
                "" if graph.speed is None else f"{graph.speed:.2f}",
                f"{graph.num_bytes / max(1, graph.float_bytes):.2f}",
                "" if graph.min_cosine is None else f"{graph.min_cosine:.6f}",
                "kept" if graph.kept else f"not kept: {graph.reason}",
            )
            for graph in result.graphs
        ]
        print_table("lower precision", ["graph", "times as fast", "share of bytes", "least cosine", ""], low)
    if result.accuracy:
        names = list(result.accuracy)
        scores = [
            (task, *(f"{100 * result.accuracy[name][task]:.1f}" for name in names))
            for task in result.accuracy[names[0]]
        ]
        print_table("accuracy in %", ["held-out task", *names], scores)
    print_lines(f"export: {result.folder}", f"card: {Path(result.folder) / CARD_FILE}")
