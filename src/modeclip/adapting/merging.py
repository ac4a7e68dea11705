"""Average the weights of several models of one architecture into one model of the same size.

There are uniform and weighted averages, the greedy soup (models by falling held-out score; each is kept if the average
with it scores no worse than the average without it), and the line between a seed and a model tuned from it (WiSE-FT).
Averaging works for models that continued from one seed, as data experts do: their weights lie in one valley of the
loss. Models of different random starts have the same shapes too, but their average is worth nothing. What lies beside a
model (``job.json`` of its training, the manifest of its bundle, ``finetune.json``, ``merge.json``) tells where it comes
from; models that have no ancestor in common are refused, and where nothing tells, a line says so.

CLIP-MoEs of one shape are averaged like any models: expert by expert, and router by router.

Sums are float64, one tensor at a time, so memory does not grow with the number of models. Every float is averaged,
also the logit scale (its logarithm, as it is stored) and the running statistics of batch norms. Other tensors (position
ids) must be equal in all models. The counters of batch norms come from the first model.

Source: model soups (arXiv 2203.05482), greedy soup: recipe 1; WiSE-FT (arXiv 2109.01903), Sec. 3.
Price: reading each model once; greedy: K (K + 1) / 2 reads and 2 K - 1 evaluations for K models.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modeclip.adapting.validation import Examiner, open_tasks
from modeclip.data.prompts import check_templates
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError, check_least
from modeclip.evaluation.intervals import Outcome, average
from modeclip.mixture.bundle import Bundle, check_files, load_bundle
from modeclip.mixture.manifest import MANIFEST_FILE, SEED
from modeclip.models.clip import CONFIG_FILE, Clip, check_model, load_clip, save_clip
from modeclip.models.deltas import Weights, open_weights, weights_file
from modeclip.system.console import log, progress
from modeclip.system.files import hash_file, read_json, write_json, writing
from modeclip.system.paths import expand_homes, home_path
from modeclip.training.jobs import JOB_FILE, TrainJob

if TYPE_CHECKING:
    import torch

RESULT_FILE = "merge.json"
"""What an average leaves beside its weights."""
FINETUNE_FILE = "finetune.json"
"""What a fine-tuning leaves beside its weights."""
MOST_ANCESTORS = 32
"""How many models back the ancestry of a model is read."""
_COUNTER = ".num_batches_tracked"  # batch norms use it only if they have no momentum, as in no CLIP
_START = ("init_logit_scale", "init_logit_bias")  # settings of a random start, which the weights replace


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How models are averaged."""

    how: Literal["uniform", "greedy"] = "uniform"
    """`uniform`: all models count the same, or by `weights`; `greedy`: only models that do not lower the held-out score
    are kept."""
    weights: tuple[float, ...] = ()
    """Weight of each model, at least 0, such as those of a routing; they are divided by their sum. Default: equal."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts for class names of the tasks, {} where the name goes."""
    batch_size: int = 256
    """Images encoded at a time."""
    different_seeds: bool = False
    """Average models of different seeds too, whose average is as good as random weights."""

    def __post_init__(self) -> None:
        """Check the weights and the templates."""
        if self.how == "greedy" and self.weights:
            raise ModeclipError("merge: greedy chooses the models by itself; drop --weights, or --how greedy")
        if any(not 0 <= weight < math.inf for weight in self.weights) or (self.weights and not any(self.weights)):
            raise ModeclipError(
                f"merge.weights must be at least 0, one of them above, got {' '.join(map(str, self.weights))}"
            )
        check_templates(self.templates, "merge")
        check_least("merge", self, batch_size=1)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model that was to be averaged."""

    name: str
    """As it was given, or bundle/expert."""
    weight: float
    """Its share of the average, in [0, 1]."""
    score: float | None
    """Mean accuracy of this model over the tasks; None without tasks."""
    accuracy: Mapping[str, float]
    """Accuracy of this model on each task."""
    soup_score: float | None = None
    """Greedy: mean accuracy of the average of this model and those kept before it."""


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The result of an average, as ``merge.json`` beside the model holds it."""

    folder: str
    """The open_clip folder that was written."""
    how: str
    """`uniform`, `weighted` or `greedy`."""
    candidates: tuple[Candidate, ...]
    """The models, in the order in which they were taken."""
    left_out: tuple[str, ...]
    """Experts of bundles that are not finished and were not averaged."""
    score: float | None
    """Mean accuracy of the averaged model over the tasks; None without tasks."""
    accuracy: Mapping[str, float]
    """Accuracy of the averaged model on each task."""
    same_seed: bool | None = None
    """Whether all of them come from one seed; None: not known."""


@dataclass(frozen=True, kw_only=True)
class SoupTrial:
    """One step of a greedy soup."""

    index: int
    """Place of the model that was tried, in the order in which the models were given."""
    score: float
    """Score of the average of this model and those kept before it."""
    kept: bool
    """Whether the model stays in the average."""


def merge(
    models: Sequence[str | Path],
    config: MergeConfig,
    *,
    out: str | Path,
    tasks: str | None = None,
    selection: Selection = ALL,
) -> MergeResult:
    """Average models and write the average as an open_clip folder.

    Args:
        models: open_clip folders, model specifications, or bundles, which stand for their finished experts.
        config: Which average.
        out: Folder of the average; it must be none of the models.
        tasks: Catalog of zero-shot tasks on which the models and the average are scored; greedy needs it. Tasks that
            have chosen the models are no fair test of the average, so report it on others.
        selection: Rows of that catalog that are asked.

    Raises:
        ModeclipError: There are fewer than two models, they differ in architecture or come from different seeds, or
            greedy has no tasks.
    """
    out = home_path(out)
    named, left_out = list_models(models)
    _check_request(named, left_out, config, out, tasks)
    if not tasks and not selection.is_all:
        raise ModeclipError(f"merge: {selection} selects images of tasks; give --tasks TASKS.lance, or leave it out")
    same_seed = check_seeds(named, different=config.different_seeds)
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modeclip-merge-")))
        folders = [as_folder(spec, room / str(index)) for index, (_, spec) in enumerate(named)]
        check_alike(dict(zip((name for name, _ in named), folders, strict=True)))
        examiner = open_tasks(tasks, config.templates, config.batch_size, selection) if tasks else None
        clip = load_clip(folders[0])
        candidates = _candidates([name for name, _ in named], folders, config, clip, examiner)
        chosen = {candidate.name: candidate.weight for candidate in candidates}
        average_into(clip, folders, [chosen[name] for name, _ in named])
        found = examiner.examine(clip) if examiner else None
    with writing(out):
        save_clip(clip, out)
        result = MergeResult(
            folder=str(out),
            how="weighted" if config.weights else config.how,
            candidates=tuple(candidates),
            left_out=tuple(left_out),
            score=average(found) if found else None,
            accuracy=_accuracy(found),
            same_seed=same_seed,
        )
        write_json(out / RESULT_FILE, asdict(result), indent=2)
    return result


def greedy_soup(scores: Sequence[float], score_of: Callable[[tuple[int, ...]], float]) -> list[SoupTrial]:
    """Choose models as the greedy soup does: first the best one, then every one that does not lower the score.

    Args:
        scores: Score of each model by itself.
        score_of: Function that returns the score of an average, given the places of its models (ascending).

    Returns:
        One step for each model, by falling score; models of equal score keep their order.

    Examples:
        >>> steps = greedy_soup([0.5, 0.7, 0.6], lambda kept: 0.8 if kept == (1, 2) else 0.4)
        >>> [(step.index, step.kept) for step in steps]
        [(1, True), (2, True), (0, False)]
    """
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    kept, best = [order[0]], scores[order[0]]
    steps = [SoupTrial(index=order[0], score=best, kept=True)]
    for index in order[1:]:
        score = score_of(tuple(sorted([*kept, index])))
        steps.append(SoupTrial(index=index, score=score, kept=score >= best))
        if score >= best:
            kept.append(index)
            best = score
    return steps


def interpolate(seed: str | Path, tuned: str | Path, alpha: float) -> Clip:
    """Return the model whose weights are (1 - alpha) of the seed's and alpha of the tuned one's (WiSE-FT).

    Args:
        seed: Model folder of the start.
        tuned: Model folder of what was trained from it.
        alpha: Share of the tuned model, in [0, 1]. At 0 and at 1 the weights are bit for bit those of that model.

    Raises:
        ModeclipError: The models differ in architecture, or alpha is out of its range.
    """
    folders = [Path(seed), Path(tuned)]
    check_alike({str(folder): folder for folder in folders})
    clip = load_clip(folders[0])
    interpolate_into(clip, folders[0], folders[1], alpha)
    return clip


def interpolate_into(clip: Clip, seed: Path, tuned: Path, alpha: float) -> None:
    """Give a model of the same architecture the weights that ``interpolate`` describes."""
    if not 0 <= alpha <= 1:
        raise ModeclipError(f"alpha must lie in [0, 1] (0: the seed, 1: the tuned model), got {alpha}")
    average_into(clip, [seed, tuned], [1 - alpha, alpha])


def average_into(clip: Clip, folders: Sequence[Path], weights: Sequence[float]) -> None:
    """Give a model the weighted average of the weights in model folders, which ``check_alike`` has passed.

    Args:
        clip: Receives the average; its own weights are lost.
        folders: Model folders; those of weight 0 are not read.
        weights: At least 0, not all 0; divided by their sum.
    """
    import torch

    used = [(folder, float(weight)) for folder, weight in zip(folders, weights, strict=True) if weight]
    total = math.fsum(weight for _, weight in used)
    with torch.no_grad():
        for name, place in clip.model.state_dict().items():
            first = _tensor(used[0][0], name)
            if len(used) == 1 or not first.is_floating_point():
                place.copy_(first)
                continue
            mean = first.double() * used[0][1]
            for folder, weight in used[1:]:
                mean += _tensor(folder, name).double() * weight
            place.copy_(mean / total)


def list_models(models: Sequence[str | Path]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (name, specification) of each model, and the names of experts that are not finished.

    A bundle stands for its finished experts.

    Raises:
        ModeclipError: A model is unknown or has no weights, a folder holds no model, or a model is given twice.
    """
    named: list[tuple[str, str]] = []
    left_out: list[str] = []
    for model in (expand_homes(str(model)) for model in models):
        if not (Path(model) / MANIFEST_FILE).is_file():
            named.append((model, find_model(model, "merge")))
            continue
        bundle = load_bundle(model)
        check_files(bundle)
        for index, expert in enumerate(bundle.experts):
            name = f"{model.rstrip('/')}/{expert.name}"
            if expert.folder != SEED:
                named.append((name, str(bundle.model_folder(index))))
            else:
                left_out.append(name)
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ModeclipError(f"merge: {twice} is given twice; give it more weight with --weights instead")
    return named, left_out


def find_model(model: str, command: str) -> str:
    """Return the specification of one model: ``BUNDLE#expert-1`` and ``BUNDLE/expert-1`` are folders of the bundle.

    The files of a model in a bundle are compared with their hashes.

    Args:
        model: What was given.
        command: Who asks, for messages.

    Raises:
        ModeclipError: It is unknown, or a bundle, of which one expert has to be chosen, or its files are damaged.
    """
    path, place, member = Path(model), Path(model), ""
    if not path.exists() and "#" in model:
        whole, _, member = model.rpartition("#")
        place = Path(whole)
    elif not (path / MANIFEST_FILE).is_file() and path.name and (path.parent / MANIFEST_FILE).is_file():
        place, member = path.parent, path.name
    if not member and not (place / MANIFEST_FILE).is_file():
        check_model(model, random_weights=False)
        return model
    bundle = load_bundle(place)
    folders = {SEED: SEED} | {expert.name: expert.folder for expert in bundle.experts}
    if member not in folders:
        problem = f"bundle {place} has no model {member!r}" if member else f"{model} is a bundle"
        raise ModeclipError(f"{command}: {problem}; give a model in it, {place}#NAME: {', '.join(folders)}")
    if folders[member] != member:
        log(f"{model}: this expert is not trained; the seed, which stands in for it, is taken")
    check_files(bundle, folders[member])
    return str(bundle.path / folders[member])


# ---------------------------------------------------------------- where models come from


@dataclass(frozen=True, kw_only=True)
class Ancestry:
    """What a model comes from, as far as the files beside it tell."""

    known: frozenset[str] = frozenset()
    """Digests of jobs, hashes of weights and names of published weights, the model's own among them."""
    is_whole: bool = False
    """Whether they reach back to a random start or to published weights."""

    @classmethod
    def of(cls, spec: str, depth: int = 0) -> Ancestry:
        """Read the ancestry of a model, which is itself ``depth`` models away from the one that was asked for."""
        folder = Path(spec.removeprefix("local-dir:"))
        if not folder.is_dir():
            is_published = "@" in spec or spec.startswith("hf-hub:")
            return cls(known=frozenset({spec}), is_whole=True) if is_published else cls()
        weights = weights_file(folder)
        own = cls(known=frozenset({hash_file(weights)})) if weights.is_file() else cls()
        if depth > MOST_ANCESTORS:
            return own
        try:
            if (folder.parent / MANIFEST_FILE).is_file():
                return cls._in_bundle(load_bundle(folder.parent), folder.name)
            if (folder / JOB_FILE).is_file():
                return own._after(*cls._of_job(TrainJob.load(folder / JOB_FILE), depth + 1))
            if (folder / FINETUNE_FILE).is_file():
                model = read_json(folder / FINETUNE_FILE, dict[str, Any], "")["model"]
                return own._after(cls.of(_spec_of(model), depth + 1))
            if (folder / RESULT_FILE).is_file():
                parts = read_json(folder / RESULT_FILE, dict[str, Any], "")["candidates"]
                return own._after(*(cls.of(_spec_of(part["name"]), depth + 1) for part in parts if part["weight"]))
        except (ModeclipError, KeyError, TypeError, AttributeError):  # a file that is damaged tells nothing
            pass
        return own

    def _after(self, *parents: Ancestry) -> Ancestry:
        """Return the ancestry of a model that was made from others."""
        known = self.known.union(*(parent.known for parent in parents))
        return Ancestry(known=known, is_whole=all(parent.is_whole for parent in parents))

    @classmethod
    def _of_job(cls, job: TrainJob, depth: int) -> list[Ancestry]:
        """Return a job itself and what it starts from."""
        if job.start_from is not None:
            return [cls(known=frozenset({job.digest, job.start_digest}), is_whole=True), cls.of(job.start_from, depth)]
        start = job.config.model
        has_weights = Path(start).is_dir() or "@" in start or start.startswith("hf-hub:")
        own = cls(known=frozenset({job.digest}), is_whole=True)
        return [own, cls.of(start, depth)] if has_weights else [own]

    @classmethod
    def _in_bundle(cls, bundle: Bundle, folder: str) -> Ancestry:
        """Return the ancestry of a model in a bundle; all of them continued its seed, unless one was forced in."""
        experts = {expert.folder: expert.name for expert in (*bundle.experts, *bundle.class_experts)}
        name = experts.get(folder, folder) if folder != SEED else SEED  # a replaced expert's folder has another name
        own, seed = ({bundle.weights_hash(f), bundle.job_digest(n)} for f, n in ((folder, name), (SEED, SEED)))
        is_forced = False
        for edit in bundle.edits:
            if edit.get("expert") == name:  # one that was not forced in continues the seed, or what was there before
                is_forced = edit.get("forced") or (is_forced and edit.get("start") not in seed - {None})
        if is_forced:
            return cls(known=frozenset(filter(None, own)))
        recipe = bundle.lineage.get("recipe")
        start = str((recipe.get("train") or {}).get("model", "")) if isinstance(recipe, dict) else ""
        published = {start} if "@" in start or start.startswith("hf-hub:") else set()
        return cls(known=frozenset(filter(None, own | seed | published)), is_whole=True)


def _spec_of(model: str) -> str:
    """Return a model's folder in a bundle for ``BUNDLE#expert-1``, else what was given."""
    return model if Path(model).exists() else "/".join(model.rsplit("#", 1))


def check_seeds(models: Sequence[tuple[str, str]], *, different: bool = False) -> bool | None:
    """Return whether models come from one seed, None if that is not known, which a line says then.

    Args:
        models: Name and specification of each model.
        different: Whether different seeds are no error.

    Raises:
        ModeclipError: Two of them come from different seeds.
    """
    (first, spec), *others = models
    one = Ancestry.of(spec)
    unknown: list[str] = []
    apart: list[str] = []
    for name, other in others:
        two = Ancestry.of(other)
        if not one.known & two.known:
            (apart if one.is_whole and two.is_whole else unknown).append(name)
    if apart and not different:
        raise ModeclipError(
            f"merge: {first} and {apart[0]} come from different seeds, and the average of such models is worth "
            "nothing; give models that continued one seed, or --different-seeds to average them anyway"
        )
    if apart:
        log(f"merge: warning: {first} and {apart[0]} come from different seeds; their average is worth nothing")
    elif unknown:
        log(
            f"merge: warning: it is not known whether {first} and {unknown[0]} come from one seed: no job.json, "
            "mode.json, finetune.json or merge.json beside them tells; the average of different seeds is worth nothing"
        )
    return False if apart else None if unknown else True


def as_folder(spec: str, folder: Path) -> Path:
    """Return a model's own folder of safetensors; a model without one is written to ``folder``."""
    own = Path(spec.removeprefix("local-dir:"))
    if weights_file(own).is_file() and (own / CONFIG_FILE).is_file():
        return own
    save_clip(load_clip(spec), folder)
    return folder


def check_alike(folders: Mapping[str, Path]) -> None:
    """Raise unless models have the same architecture and equal buffers.

    Args:
        folders: Model folder by name, the name for the message.

    Raises:
        ModeclipError: They differ in a tensor's name or shape, in a setting of the architecture, or in a buffer
            that is no float; or a file cannot be read.
    """
    import torch

    (first, folder), *others = folders.items()
    with open_weights(folder) as one:
        shapes, settings = _shapes(one), _settings(folder)
        for other, path in others:
            with open_weights(path) as two:
                problem = _first_difference(settings, _settings(path)) or _first_difference(shapes, _shapes(two))
                problem = problem or next(
                    (
                        f"{name} holds other numbers"
                        for name in shapes
                        if not name.endswith(_COUNTER)
                        and not one.kind(name).startswith(("F", "BF"))
                        and not torch.equal(one.tensor(name), two.tensor(name))
                    ),
                    None,
                )
            if problem:
                raise ModeclipError(
                    f"models of different architectures cannot be averaged: {first} and {other}: {problem}"
                )


def _check_request(
    named: Sequence[tuple[str, str]], left_out: Sequence[str], config: MergeConfig, out: Path, tasks: str | None
) -> None:
    if len(named) < 2:
        missing = f"; not finished: {', '.join(left_out)}" if left_out else ""
        raise ModeclipError(f"merge: expected at least two models, got {len(named)}{missing}")
    if config.weights and len(config.weights) != len(named):
        names = ", ".join(name for name, _ in named)
        raise ModeclipError(f"merge: expected {len(named)} weights ({names}), got {len(config.weights)}")
    if config.how == "greedy" and not tasks:
        raise ModeclipError("merge: greedy needs a held-out score; give --tasks TASKS.lance, or --how uniform")
    for name, spec in named:
        if Path(spec).is_dir() and Path(spec).resolve() == out.resolve():
            raise ModeclipError(f"merge: {name} is also the folder to write to; choose another --out")


def _candidates(
    names: Sequence[str], folders: Sequence[Path], config: MergeConfig, clip: Clip, examiner: Examiner | None
) -> list[Candidate]:
    """Score each model if there are tasks, and choose the weights."""
    found: list[dict[str, Outcome] | None] = [None] * len(names)
    if examiner is not None:
        with progress("score", len(names), "models") as advance:
            for index in range(len(names)):
                average_into(clip, [folders[index]], [1.0])
                found[index] = examiner.examine(clip)
                advance(1)
    scores = [average(each) if each else None for each in found]
    weights = list(config.weights) or [1.0] * len(names)
    order, tried = list(range(len(names))), dict[int, float]()
    if config.how == "greedy" and examiner is not None:
        asked = examiner

        def score_of(kept: tuple[int, ...]) -> float:
            average_into(clip, [folders[index] for index in kept], [1.0] * len(kept))
            return average(asked.examine(clip))

        with progress("soup", len(names), "models") as advance:
            steps = greedy_soup([score for score in scores if score is not None], score_of)
            advance(len(names))
        order = [step.index for step in steps]
        tried = {step.index: step.score for step in steps}
        weights = [float(index in {step.index for step in steps if step.kept}) for index in range(len(names))]
    total = math.fsum(weights)
    return [
        Candidate(
            name=names[index],
            weight=weights[index] / total,
            score=scores[index],
            accuracy=_accuracy(found[index]),
            soup_score=tried.get(index),
        )
        for index in order
    ]


def _accuracy(found: Mapping[str, Outcome] | None) -> dict[str, float]:
    return {task: outcome.score for task, outcome in (found or {}).items()}


def _tensor(folder: Path, name: str) -> torch.Tensor:
    """Read one tensor. The file is opened for it alone: all that was read of a mapped file stays in memory."""
    with open_weights(folder) as weights:
        return weights.tensor(name)


def _shapes(weights: Weights) -> dict[str, str]:
    return {name: str(list(weights.shape(name))) for name in weights.names}


def _settings(folder: Path) -> dict[str, str]:
    """Return the settings that decide what a model computes: the architecture, and how pixels are normalised."""
    try:
        content = read_json(folder / CONFIG_FILE, dict[str, dict[str, Any]], "get it again")
        model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
    except KeyError as error:
        raise ModeclipError(f"model folder {folder}: {CONFIG_FILE} cannot be read ({error}); get it again") from error
    if "moe" in content:
        model = model | {"moe": content["moe"]}
    return {name: json.dumps(value, sort_keys=True) for name, value in model.items() if name not in _START} | {
        name: json.dumps(pixels.get(name)) for name in ("mean", "std")
    }


def _first_difference(one: Mapping[str, str], two: Mapping[str, str]) -> str | None:
    name = next((name for name in sorted({*one, *two}) if one.get(name) != two.get(name)), None)
    return None if name is None else f"{name} is {one.get(name, 'missing')} and {two.get(name, 'missing')}"
