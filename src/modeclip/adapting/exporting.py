"""Export a model for other tools: ONNX graphs, a ``CLIPModel`` of Hugging Face, or a plain open_clip folder.

    FOLDER/
      README.md          the model card: how to load it, data and lineage, results, licence
      export.json        what was exported from what, parity, speed and accuracy, and the names of all files
      image.onnx, text.onnx, maybe image.int8.onnx ...          --to onnx
      model.safetensors, config.json, processor_config.json ... --to hf
      open_clip_config.json, open_clip_model.safetensors ...    --to open_clip

Whatever is written is loaded again by the tool that it is for and compared with the model (`modeclip.models.export`).
An int8 or bfloat16 graph stays only if it is faster than the float32 one on this machine; its speed, its distance and,
with tasks, its accuracy are written down either way.

The folder appears whole or not at all. An earlier export is replaced; a folder that holds anything else is refused.
Price: reading and writing the weights, about ten seconds for each ONNX graph, and one pass over the tasks for the model
and for each set of graphs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from modeclip.adapting.merging import find_model
from modeclip.adapting.model_card import Score, write_card
from modeclip.adapting.validation import Examiner, open_tasks
from modeclip.data.prompts import check_templates
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError, check_least, unknown
from modeclip.mixture.bundle import load_bundle
from modeclip.mixture.manifest import MANIFEST_FILE
from modeclip.mixture.router import ClusterRouter
from modeclip.models.clip import PARITY_FILE, Clip, load_clip, save_clip
from modeclip.system.console import busy
from modeclip.system.files import read_json, versions, write_json, writing
from modeclip.system.paths import expand_homes, home_path

if TYPE_CHECKING:
    from modeclip.models.blocks import Tower

RESULT_FILE = "export.json"
FORMATS = ("onnx", "hf", "open_clip")
_LOW = ("int8", "bf16")
_LIBRARIES = {"onnx": "onnx", "hf": "transformers", "open_clip": "open_clip"}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What a model is exported to, and how it is judged."""

    to: Literal["onnx", "hf", "open_clip"]
    """Format: onnx (graphs for any ONNX runtime), hf (CLIPModel of transformers with its processor) or open_clip."""
    int8: bool = False
    """onnx: also graphs with int8 matrices, kept where they are faster on this machine."""
    bf16: bool = False
    """onnx: also graphs in bfloat16, kept where they run and are faster on this machine."""
    license: str = "unknown"
    """Licence of the weights for the model card, as the Hub spells it: apache-2.0, cc-by-4.0, other..."""
    templates: Annotated[tuple[str, ...], arg(name="template")] = ("{}",)
    """Prompts with ``{}`` where a class name goes, for the tasks."""
    batch_size: int = 256
    """Images of the tasks that are encoded at a time."""

    def __post_init__(self) -> None:
        """Check the format and what goes with it."""
        if self.to not in FORMATS:
            raise unknown("format", self.to, FORMATS)
        if self.to != "onnx" and (self.int8 or self.bf16):
            raise ModeclipError(f"export.{'int8' if self.int8 else 'bf16'}: is for ONNX graphs; give --to onnx with it")
        if not _LICENSE.fullmatch(self.license):
            raise ModeclipError(f"export.license: expected a name such as apache-2.0 or other, got {self.license!r}")
        check_templates(self.templates, "export")
        check_least("export", self, batch_size=1)


@dataclass(frozen=True, kw_only=True)
class LowGraph:
    """A graph of lower precision beside the float32 one."""

    tower: str
    """``image`` or ``text``."""
    kind: str
    """``int8`` or ``bf16``."""
    speed: float | None
    """How many times as fast as float32 it is on this machine; None: it does not run."""
    num_bytes: int
    """Size of its file."""
    float_bytes: int
    """Size of the float32 file."""
    max_abs: float | None
    """Largest difference from the model's features, of unit norm."""
    min_cosine: float | None
    """Least cosine with the model's features."""
    kept: bool
    """Whether the file stays: it is faster."""
    reason: str
    """Why it does not stay; empty if it does."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export, as ``export.json`` holds it."""

    folder: str
    """The folder that was written."""
    model: str
    """The model as it was given."""
    to: str
    """The format."""
    parity: Mapping[str, Any]
    """What was compared with the model, by graph or tower: largest difference, least cosine."""
    graphs: tuple[LowGraph, ...]
    """Graphs of lower precision, those that were not kept among them."""
    accuracy: Mapping[str, Mapping[str, float]]
    """Main metric on each task, by what answered: ``model``, ``onnx``, ``int8``, ``bf16``."""
    logit_scale: tuple[float, ...]
    """exp(logit scale) of the model, or of each expert in the order of the routing weights."""
    experts: tuple[str, ...]
    """Names of the experts in that order; none for a single model."""
    preprocess: Mapping[str, Any]
    """Pixels: ``image_size`` (width, height), ``mean``, ``std``, ``interpolation``, ``resize_mode``."""
    context_length: int
    """Most token ids of a text."""
    files: tuple[str, ...]
    """All files of the export."""
    versions: Mapping[str, str]
    """Versions of the packages that made it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Source:
    """What is exported: one CLIP, or the experts of a bundle."""

    name: str
    clips: tuple[Clip, ...]
    place: Path | None
    experts: tuple[str, ...] = ()
    weighed: Tower | None = None
    parity: Mapping[str, Any] | None = None


def export(
    model: str | Path,
    config: ExportConfig,
    *,
    out: str | Path,
    tasks: str | None = None,
    selection: Selection = ALL,
) -> Exported:
    """Export a model, and write down how close the export is to it.

    Args:
        model: A model folder, ``BUNDLE#expert-1``, ``NAME@TAG``, ``hf-hub:ORG/NAME``, a folder that transformers saved
            as ``CLIPModel``, or for ONNX a bundle, whose graphs take the routing weights.
        config: Which format.
        out: Folder of the export; it must be new, empty, or an earlier export.
        tasks: Catalog of held-out zero-shot tasks on which the model, and each set of graphs, is scored.
        selection: Rows of that catalog that are asked.

    Raises:
        ModeclipError: The format cannot express the model, the export computes something else, or the folder holds
            other files.
    """
    out = home_path(out)
    if config.to == "onnx":
        from modeclip.models.export.onnx import check_packages

        check_packages()
    _check_out(out, model)
    if not tasks and not selection.is_all:
        raise ModeclipError(f"export: {selection} selects images of tasks; give --tasks TASKS.lance, or leave it out")
    examiner = open_tasks(tasks, config.templates, config.batch_size, selection) if tasks else None
    source = _open(str(model), config)
    if source.experts and examiner:
        raise ModeclipError(
            f"export: --tasks scores a single model; modeclip evaluate {model} scores a bundle, whose graphs equal it"
        )
    with writing(out), _appearing(out) as part:
        accuracy = {"model": _scores(examiner, source.clips[0])} if examiner else {}
        parity, graphs = _write(source, config, part)
        if examiner and config.to == "onnx":
            accuracy |= _scores_of_graphs(examiner, source.clips[0], part, graphs)
        visual = source.clips[0].model.visual
        result = Exported(
            folder=str(out),
            model=str(model),
            to=config.to,
            parity=parity,
            graphs=tuple(graphs),
            accuracy={kind: {score.task: score.value for score in found} for kind, found in accuracy.items()},
            logit_scale=tuple(float(clip.model.logit_scale.detach().float().exp().max()) for clip in source.clips),
            experts=source.experts,
            preprocess={
                "image_size": source.clips[0].image_size,
                "mean": list(visual.image_mean),
                "std": list(visual.image_std),
                "interpolation": source.clips[0].config["preprocess_cfg"].get("interpolation") or "bicubic",
                "resize_mode": source.clips[0].config["preprocess_cfg"].get("resize_mode") or "shortest",
            },
            context_length=source.clips[0].tokens([""]).shape[1],
            files=(),
            versions=versions(),
        )
        write_card(
            part,
            name=source.name,
            source=source.place,
            kind=_LIBRARIES[config.to],
            usage=_usage(source, config),
            license=config.license,
            scores=accuracy.get("model", ()),
            rows=_card_rows(result),
        )
        files = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
        result = replace(result, files=(*files, RESULT_FILE))
        write_json(part / RESULT_FILE, asdict(result), indent=2)
    return result


def _open(model: str, config: ExportConfig) -> _Source:
    from modeclip.models.export.hf import is_hf, load_hf

    path = Path(expand_homes(model))
    if is_hf(path):
        clip, parity = load_hf(path)
        return _Source(name=path.resolve().name, clips=(clip,), place=path, parity=parity)
    if (path / MANIFEST_FILE).is_file():
        bundle = load_bundle(path)
        names = tuple(expert.name for expert in bundle.experts)
        if config.to != "onnx":
            raise ModeclipError(
                f"export: {model} is a bundle of {len(names)} models, which no {config.to} folder holds; give one of "
                f"them, {model}#{names[0]}, or --to onnx"
            )
        weighed: Tower = "image" if ClusterRouter(bundle).per_image else "text"
        clips = tuple(load_clip(find_model(f"{path}#{name}", "export")) for name in names)
        title = str(bundle.manifest.get("name") or path.resolve().name)
        return _Source(name=title, clips=clips, place=path, experts=names, weighed=weighed)
    spec = find_model(expand_homes(model), "export")
    clip = load_clip(spec)
    if "moe" in clip.config and config.to == "open_clip":
        raise ModeclipError(
            f"export: {model} is a CLIP-MoE, which open_clip has no layers for; load its folder with modeclip, or give "
            "--to onnx"
        )
    place = Path(spec.removeprefix("local-dir:"))
    name = re.sub(r"^.*/(?=[^/]+/?$)", "", model).strip("/") or model
    return _Source(name=name, clips=(clip,), place=place if place.is_dir() else None)


def _write(source: _Source, config: ExportConfig, part: Path) -> tuple[dict[str, Any], list[LowGraph]]:
    """Write the files of the format, and return what was compared."""
    if config.to == "hf":
        from modeclip.models.export.hf import save_hf

        with busy("convert to transformers"):
            return save_hf(source.clips[0], part), []
    if config.to == "open_clip":
        with busy("write the open_clip folder"):
            save_clip(source.clips[0], part)
        found = read_json(part / PARITY_FILE, dict[str, Any], "")
        return dict(source.parity or found), []
    from modeclip.models.export.onnx import save_onnx

    with busy("write ONNX graphs"):
        parity = save_onnx(source.clips, part, weighed=source.weighed)
        _write_processor(source.clips[0], part)
    graphs = []
    for kind in (kind for kind in _LOW if getattr(config, kind)):
        for tower in ("image", "text"):
            with busy(f"write and time the {kind} graph of {tower}s"):
                graphs.append(_low_graph(source, tower, kind, part))
    return {item.file: {"max_abs": item.max_abs, "min_cosine": item.min_cosine} for item in parity}, graphs


def _write_processor(clip: Clip, part: Path) -> None:
    """Write tokenizer and image processor beside the graphs, where those of transformers are as good as the model's."""
    from modeclip.models.export.hf import processor_of
    from modeclip.models.trunk import is_exact_without_padding

    if is_exact_without_padding(clip.model):  # others were trained with their own padding
        try:
            processor_of(clip).save_pretrained(part)
        except ModeclipError:  # pictures are prepared as export.json says
            return


def _low_graph(source: _Source, tower: Tower, kind: str, part: Path) -> LowGraph:
    """Write a graph of lower precision, compare it, and remove it unless it is faster."""
    from modeclip.models.export.onnx import FASTER, compare, quantize, speed_ratio, to_bfloat16

    plain, path = part / f"{tower}.onnx", part / f"{tower}.{kind}.onnx"
    weighed = source.weighed == tower
    speed = parity = None
    try:
        if kind == "int8":
            quantize(plain, path)
        else:
            to_bfloat16(source.clips, tower, path, weighed=weighed)
        parity = compare(source.clips, tower, path, weighed=weighed)
        num_weights = len(source.clips) if weighed else 0
        speed = speed_ratio(plain, path, source.clips[0], tower, num_weights=num_weights)
        reason = "" if speed >= FASTER else f"{speed:.2f} times as fast as float32"
    except ModeclipError as error:
        reason = str(error)
    size = path.stat().st_size if path.is_file() else 0
    if reason:
        for file in part.glob(f"{path.name}*"):
            file.unlink()
    return LowGraph(
        tower=tower,
        kind=kind,
        speed=speed,
        num_bytes=size,
        float_bytes=plain.stat().st_size,
        max_abs=None if parity is None else parity.max_abs,
        min_cosine=None if parity is None else parity.min_cosine,
        kept=not reason,
        reason=reason,
    )


def _scores(examiner: Examiner, clip: Clip) -> list[Score]:
    sizes = {task.name: len(task.images) for task in examiner.tasks}
    found = examiner.examine(clip)
    return [
        Score(task=name, metric=outcome.main, value=outcome.score, num_images=sizes[name])
        for name, outcome in found.items()
    ]


def _scores_of_graphs(examiner: Examiner, clip: Clip, part: Path, graphs: Sequence[LowGraph]) -> dict[str, list[Score]]:
    """Score the float32 graphs, and those of each lower precision of which one was kept."""
    from modeclip.models.export.onnx import with_graphs

    found = {}
    for kind in ("onnx", *_LOW):
        files: dict[Tower, Path] = {"image": part / "image.onnx", "text": part / "text.onnx"}
        for tower in files:
            if (low := part / f"{tower}.{kind}.onnx").is_file():
                files[tower] = low
        if kind == "onnx" or any(graph.kept and graph.kind == kind for graph in graphs):
            found[kind] = _scores(examiner, with_graphs(clip, files))
    return found


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of ``out`` at the end, as a whole; after an error nothing is left of it."""
    part, old = (out.with_name(f"{out.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.replace(old)
        part.replace(out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _check_out(out: Path, model: str | Path) -> None:
    """Raise unless a folder is new, empty, or an earlier export without other files, and not the model itself."""
    if Path(expand_homes(str(model))).resolve() == out.resolve():
        raise ModeclipError(f"export: {out} is the model itself; choose another folder with --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise ModeclipError(f"export: {out} is a file; choose a folder with --out")
    found = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    if not found and not any(out.iterdir()):
        return
    known: set[str] = set()
    if (out / RESULT_FILE).is_file():
        known = set(read_json(out / RESULT_FILE, dict[str, Any], "choose another folder").get("files") or ())
    if strange := sorted(found - known) or (sorted(path.name for path in out.iterdir()) if not found else []):
        raise ModeclipError(
            f"export: {out} holds {strange[0]}, which no export has written; choose a new or an empty folder with --out"
        )


def _usage(source: _Source, config: ExportConfig) -> str:
    if config.to == "hf":
        return (
            "from transformers import CLIPModel, CLIPProcessor\n"
            'model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")'
        )
    if config.to == "open_clip":
        return (
            "import open_clip\n"
            'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
            'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")'
        )
    inputs = {"image": '"pixel_values": pixels', "text": '"input_ids": tokens'}
    if source.weighed:
        inputs[source.weighed] += ', "routing_weights": weights'
    return (
        "import onnxruntime\n"
        'image, text = (onnxruntime.InferenceSession(f"FOLDER/{tower}.onnx") for tower in ("image", "text"))\n'
        f"images = image.run(None, {{{inputs['image']}}})[0]\n"
        f"texts = text.run(None, {{{inputs['text']}}})[0]\n"
        "cosines = images @ texts.T"
    )


def _card_rows(result: Exported) -> list[str]:
    """Return what the card says about the export: inputs of the graphs, parity, speed."""
    lines = []
    if result.to == "onnx":
        width, height = result.preprocess["image_size"]
        lines += [
            f"`pixel_values` is (B, 3, {height}, {width}) float32, `input_ids` (B, T) int64 with at most "
            f"{result.context_length} token ids.",
        ]
    if result.experts:
        lines += [f"`routing_weights` is (B, {len(result.experts)}), for {', '.join(result.experts)} in this order."]
    for part, found in result.parity.items():
        if isinstance(found, Mapping) and "min_cosine" in found:
            lines += ["", f"{part}: largest difference {found['max_abs']:.1e}, least cosine {found['min_cosine']:.6f}."]
    for graph in result.graphs:
        if graph.kept:
            lines += [
                "",
                f"{graph.tower}.{graph.kind}.onnx: {graph.speed:.2f} times as fast as float32 where it was made.",
            ]
    return lines
