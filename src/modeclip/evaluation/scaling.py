"""Scaling laws: how the error of each family of models falls as more compute is spent on training.

The law is error = A * compute^(-b): a straight line in log space, fitted by least squares to the points of a family. A
point is one model (size, data, samples seen), and its error is the mean over seeds. By default only the points of the
Pareto frontier are fitted, those that no cheaper point of the family beats: a model that saw too little or too much
data for its size says nothing about what the compute could have bought. The other choice is to fit all points.

Intervals are percentile bootstraps: the points of a family are drawn again with replacement, then the seeds of each
point, and the frontier and the line are made anew. With three or four points they are rough, and rather too narrow.

Two families are compared by the compute that each needs to reach one error: the error that the reference has at its
largest compute, by its law.

Source: OpenCLIP (arXiv 2212.07143), Sec. 4 and Fig. 1, for the law. Its figures are fitted to the lowest error in each
of five bins of compute; a frontier is the same idea and needs no bins. Compute as `modeclip.models.flops` counts it.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError, check_least, unknown
from modeclip.evaluation.intervals import Interval

LARGEST_LOG = 700.0
"""Logarithms are cut off here, so that their exponentials fit into a float and into JSON."""
MIN_SIZES = 3
"""Least number of different computes to fit a line to: a line fits any two of them."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How scaling laws are fitted."""

    points: Literal["frontier", "all"] = "frontier"
    """Which points of a family are fitted."""
    reference: str = "dense"
    """Family that the others are compared with; if no family has this name, the first one."""
    num_resamples: int = 2000
    """Number of resamples for the intervals."""
    confidence: float = 0.95
    """Share of the resamples between the two ends of an interval, in (0, 1)."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        if self.points not in ("frontier", "all"):
            raise unknown("choice of points", self.points, ["frontier", "all"])
        check_least("scaling", self, num_resamples=1, seed=0)
        if not 0 < self.confidence < 1:
            raise ModeclipError(f"scaling.confidence: expected a number between 0 and 1, got {self.confidence}")


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """One model at one compute."""

    name: str
    """Name of the model."""
    family: str
    """Family that it belongs to."""
    compute: float
    """Floating-point operations of its whole training."""
    errors: tuple[float, ...]
    """Error of each seed, a fraction in (0, 1]."""
    fitted: bool = True
    """Whether the law is fitted to it."""

    @property
    def error(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.errors))


@dataclass(frozen=True, kw_only=True)
class Law:
    """The scaling law of one family, error = A * compute^(-b)."""

    family: str
    """Name of the family."""
    A: Interval
    """Error at a compute of one operation, by the law; of a steep law at most e^700."""
    b: Interval
    """Exponent: 2^(1/b) times the compute halves the error."""
    num_points: int
    """Number of points that the law is fitted to."""
    residual: float
    """Root mean square distance of these points from the line, in natural logarithms of the error."""
    best_error: Interval
    """Error at the largest compute of the family, by the law."""
    compute_ratio: Interval | None
    """Compute that this family needs for the error that the reference reaches at its largest compute, divided by that
    compute; None for the reference itself, or where a law does not fall."""


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """Laws of all families with the points behind them."""

    laws: tuple[Law, ...]
    """One law for each family, the reference first."""
    points: tuple[ScalingPoint, ...]
    """All points, by family and compute."""
    config: ScalingConfig
    """How they were fitted."""
    bands: dict[str, tuple[tuple[float, float, float, float], ...]]
    """For each family, (compute, error by the law, low, high) at places along its line."""


def read_points(
    paths: Sequence[Path],
    *,
    families: Mapping[str, str] | None = None,
    compute: Mapping[str, float] | None = None,
    flops_per_sample: Mapping[str, float] | None = None,
) -> list[ScalingPoint]:
    """Read results from files with one JSON object to a line, or from what ``modeclip evaluate`` and runs leave.

    A line has name, family, compute and error, and a seed where there are several. In place of ``compute`` it may have
    ``flops_per_sample`` and ``samples``, which are multiplied; in place of ``error`` it may have ``accuracy``. Lines of
    equal name, family and compute are seeds of one point. Other fields of a line are ignored.

    Of a folder of results, or its ``results.jsonl``, each model is a point: its error is 1 minus the mean over the
    tasks of the metric that counts, of classifications if there are any; linear probes and what labels chose are left
    out.
    The same model in several folders is one point with several seeds.

    Args:
        paths: The files and folders.
        families: Results of ``evaluate``: the family of a model; else ``mixture`` if it is routed, ``dense`` if not.
        compute: Results of ``evaluate``: what the whole training of a model cost, in floating-point operations.
        flops_per_sample: The same for a training sample, where the results know how many samples there were.

    Raises:
        ModeclipError: A file cannot be read, a line lacks a field or has an impossible value, a seed comes twice, or
            what a model cost is not known.
    """
    found: dict[tuple[str, str, float], dict[Any, float]] = defaultdict(dict)
    for path in map(_results_file, paths):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
            raise ModeclipError(f"scaling: {path} cannot be read: {cause}; give files of JSON lines") from error
        evaluated: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _parse(line, f"{path}, line {number}")
            if {"metrics", "dataset", "model"} <= row.keys():
                evaluated.append(row)
                continue
            key, seed, value = _read_line(row, f"{path}, line {number}")
            if seed in found[key]:
                raise ModeclipError(
                    f"scaling: {path}, line {number}: {key[0]} of {key[1]} with seed {seed} comes twice at this "
                    "compute; give each seed its number, or each size its name"
                )
            found[key][seed] = value
        for row in _models_of(evaluated, path, families or {}, compute or {}, flops_per_sample or {}):
            key, _, value = _read_line(row, f"{path}, model {row['name']!r}")
            found[key][str(path)] = value
    points = [
        ScalingPoint(name=name, family=family, compute=compute, errors=tuple(seeds.values()))
        for (name, family, compute), seeds in found.items()
    ]
    return sorted(points, key=lambda point: (point.family, point.compute, point.name))


def _results_file(path: Path) -> Path:
    """Return the file of results in a folder that `modeclip evaluate` wrote, or in a run."""
    places = [path / "results.jsonl", path / "results" / "results.jsonl"]
    return next((place for place in places if place.is_file()), path)


def _models_of(
    results: Sequence[dict[str, Any]],
    path: Path,
    families: Mapping[str, str],
    compute: Mapping[str, float],
    flops_per_sample: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return a line for each model that was evaluated, as `read_points` describes it."""
    kinds = {str(result.get("task")) for result in results} - {"linear_probe"}
    kind = "zeroshot_classification" if "zeroshot_classification" in kinds else min(kinds, default="")
    of_model: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        own = result.get("modeclip")
        if result.get("task") == kind and not (isinstance(own, dict) and "bound" in own):
            of_model[str(result["model"])][str(result["dataset"])] = result
    tasks = set().union(*of_model.values())
    rows, unknown_cost = [], []
    for model, of_task in of_model.items():
        if lacking := sorted(tasks - of_task.keys()):
            raise ModeclipError(
                f"scaling: {path}: model {model!r} has no result on {lacking[0]!r}, which others have; evaluate all "
                "models on the same tasks"
            )
        scores, samples, is_routed = [], None, False
        for task, result in of_task.items():
            own = result["modeclip"] if isinstance(result.get("modeclip"), dict) else {}
            metrics = result["metrics"] if isinstance(result["metrics"], dict) else {}
            score = metrics.get(own.get("main", "acc1"))
            if not isinstance(score, int | float):
                raise ModeclipError(f"scaling: {path}: model {model!r} has no metric on {task!r}; evaluate it again")
            scores.append(score)
            samples, is_routed = own.get("samples"), is_routed or own.get("rule") is not None
        row: dict[str, Any] = {"name": model, "family": families.get(model, "mixture" if is_routed else "dense")}
        row["accuracy"] = sum(scores) / len(scores)
        if model in compute:
            rows.append(row | {"compute": compute[model]})
        elif model in flops_per_sample and samples is not None:
            rows.append(row | {"flops_per_sample": flops_per_sample[model], "samples": samples})
        else:
            unknown_cost.append(f"{model!r}" + (f" ({samples:,} samples)" if isinstance(samples, int) else ""))
    if unknown_cost:
        raise ModeclipError(
            f"scaling: {path}: the results do not say what the training of {', '.join(unknown_cost)} cost; give "
            "--compute MODEL=FLOPS for each, or --flops-per-sample MODEL=FLOPS where the samples are known"
        )
    return rows


def fit_scaling(points: Sequence[ScalingPoint], config: ScalingConfig | None = None) -> ScalingResult:
    """Fit the law of each family.

    Args:
        points: Points of at least three different computes for each family.
        config: How the laws are fitted.

    Raises:
        ModeclipError: There are too few points.
    """
    config = config or ScalingConfig()
    families = sorted({point.family for point in points}, key=lambda name: (name != config.reference, name))
    if not families:
        raise ModeclipError(
            "scaling: expected results, got none; give files with one JSON object to a line, see docs/evaluation.md"
        )
    marked: list[ScalingPoint] = []
    lines, limits = {}, {}
    for place, family in enumerate(families):
        own = [point for point in points if point.family == family]
        chosen = choose_points(np.array([p.compute for p in own]), np.array([p.error for p in own]), config.points)
        _check_sizes(own, chosen)
        marked += [replace(point, fitted=bool(fitted)) for point, fitted in zip(own, chosen, strict=True)]
        fitted = [point for point in marked if point.family == family and point.fitted]
        exact = fit_line(np.array([p.compute for p in fitted]), np.array([p.error for p in fitted]))
        draw = np.random.default_rng([config.seed, place])
        lines[family] = np.vstack([exact, _resample(own, config, draw)])  # (1 + resamples, 2): log A, b
        limits[family] = min(p.compute for p in own), max(p.compute for p in own)
    reference = families[0]
    laws = []
    for family in families:
        log_a, b = lines[family].T
        own = [point for point in marked if point.family == family and point.fitted]
        misses = [math.log(point.error) - (log_a[0] - b[0] * math.log(point.compute)) for point in own]
        laws.append(
            Law(
                family=family,
                A=_interval(_exp(log_a), config.confidence),
                b=_interval(b, config.confidence),
                num_points=len(own),
                residual=float(np.sqrt(np.mean(np.square(misses)))),
                best_error=_interval(_exp(log_a - b * math.log(limits[family][1])), config.confidence),
                compute_ratio=None
                if family == reference
                else _compare(lines[family], lines[reference], limits[reference][1], config.confidence),
            )
        )
    marked.sort(key=lambda point: (families.index(point.family), point.compute, point.name))
    bands = {family: _band(lines[family], *limits[family], config.confidence) for family in families}
    return ScalingResult(laws=tuple(laws), points=tuple(marked), config=config, bands=bands)


def choose_points(compute: Float[np.ndarray, " P"], error: Float[np.ndarray, " P"], which: str) -> np.ndarray:
    """Mark the points that a law is fitted to: all, or those that no point of at most their compute beats.

    Examples:
        >>> choose_points(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.6, 0.4]), "frontier")
        array([ True, False,  True])
    """
    chosen = np.ones(len(compute), bool)
    if which == "frontier":
        order = np.lexsort((error, compute))
        best = np.minimum.accumulate(error[order])
        chosen[order[1:]] = error[order[1:]] < best[:-1]
    return chosen


def fit_line(compute: Float[np.ndarray, " P"], error: Float[np.ndarray, " P"]) -> Float[np.ndarray, "2"]:
    """Fit log error = log A - b * log compute by least squares; return (log A, b).

    Examples:
        >>> fit_line(np.array([1.0, 10.0, 100.0]), np.array([0.8, 0.4, 0.2])).round(3).tolist()
        [-0.223, 0.301]
    """
    across, up = np.log(compute), np.log(error)
    centre = across.mean()
    slope = ((across - centre) @ (up - up.mean())) / np.square(across - centre).sum()
    return np.array([up.mean() - slope * centre, -slope])


def _resample(points: Sequence[ScalingPoint], config: ScalingConfig, draw: np.random.Generator) -> np.ndarray:
    """Fit the line to points and seeds that are drawn again, for each resample: (resamples, 2)."""
    compute = np.array([point.compute for point in points])
    counts = np.array([len(point.errors) for point in points])
    errors = np.array([np.resize(point.errors, counts.max()) for point in points])
    lines: list[np.ndarray] = []
    while len(lines) < config.num_resamples:
        drawn = draw.integers(0, len(points), len(points))
        if len(np.unique(np.log(compute[drawn]))) < 2:
            continue  # one compute makes no line
        seeds = draw.integers(0, counts[drawn, None], (len(points), counts.max()))
        counted = np.arange(counts.max()) < counts[drawn, None]
        error = (errors[drawn[:, None], seeds] * counted).sum(axis=1) / counts[drawn]
        chosen = choose_points(compute[drawn], error, config.points)
        if len(np.unique(np.log(compute[drawn][chosen]))) >= 2:
            lines.append(fit_line(compute[drawn][chosen], error[chosen]))
        elif config.points == "frontier":
            # The cheapest of these points is also the best: more compute did not help at all.
            lines.append(np.array([math.log(error[chosen].mean()), 0.0]))
    return np.array(lines)


def _compare(line: np.ndarray, reference: np.ndarray, compute: float, confidence: float) -> Interval | None:
    """Return the compute that a line needs for the reference's error at a compute, divided by that compute."""
    log_compute = math.log(compute)
    log_error = reference[:, 0] - reference[:, 1] * log_compute
    if line[0, 1] <= 0 or reference[0, 1] <= 0:
        return None
    falling = np.maximum(line[:, 1], 1e-3)  # a line that does not fall would never reach the error
    return _interval(np.exp(np.clip((line[:, 0] - log_error) / falling - log_compute, -50, 50)), confidence)


def _exp(logs: np.ndarray) -> np.ndarray:
    values: np.ndarray = np.exp(np.clip(logs, -LARGEST_LOG, LARGEST_LOG))
    return values


def _interval(values: np.ndarray, confidence: float) -> Interval:
    """Return the first value with an interval from the others."""
    low, high = np.quantile(values[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(values[0]), low=float(low), high=float(high))


def _band(
    lines: np.ndarray, low: float, high: float, confidence: float
) -> tuple[tuple[float, float, float, float], ...]:
    """Return (compute, error, low, high) at places along a line."""
    band = []
    for compute in np.geomspace(low, high, 40).tolist():
        interval = _interval(_exp(lines[:, 0] - lines[:, 1] * math.log(compute)), confidence)
        band.append((compute, interval.mean, interval.low, interval.high))
    return tuple(band)


def _check_sizes(points: Sequence[ScalingPoint], chosen: np.ndarray) -> None:
    """Raise if there are too few different computes for a line."""
    family, sizes = points[0].family, len(np.unique(np.log([point.compute for point in points])))
    left = len(np.unique(np.log([point.compute for point, fitted in zip(points, chosen, strict=True) if fitted])))
    if sizes < MIN_SIZES:
        raise ModeclipError(
            f"scaling: family {family}: expected results at {MIN_SIZES} different computes or more, got {sizes}; train "
            "more sizes, or leave the family out"
        )
    if left < MIN_SIZES:
        raise ModeclipError(
            f"scaling: family {family}: only {left} of its {sizes} computes are on the Pareto frontier, expected "
            f"{MIN_SIZES} or more; fit all points (--points all), or train sizes in between"
        )


def _parse(line: str, where: str) -> dict[str, Any]:
    """Return the object of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as fault:  # also of an integer with thousands of digits
        raise ModeclipError(f"scaling: {where}: expected a JSON object, got {line.strip()[:60]!r}: {fault}") from fault
    if not isinstance(row, dict):
        raise ModeclipError(f"scaling: {where}: expected a JSON object, got {line.strip()[:60]!r}")
    return row


def _read_line(row: dict[str, Any], where: str) -> tuple[tuple[str, str, float], Any, float]:
    """Return (name, family, compute), seed and error of a line."""
    missing = [field for field in ("name", "family") if not isinstance(row.get(field), str) or not row[field]]
    if missing:
        raise ModeclipError(f"scaling: {where}: expected text in {' and '.join(missing)}, got the fields {sorted(row)}")
    if "compute" in row:
        compute = _number(row, "compute", where)
    elif "flops_per_sample" in row and "samples" in row:
        compute = _number(row, "flops_per_sample", where) * _number(row, "samples", where)
    else:
        raise ModeclipError(
            f"scaling: {where}: expected compute, or flops_per_sample and samples, got the fields {sorted(row)}"
        )
    if ("error" in row) == ("accuracy" in row):
        raise ModeclipError(f"scaling: {where}: expected either error or accuracy, got the fields {sorted(row)}")
    error = _number(row, "error", where) if "error" in row else 1 - _number(row, "accuracy", where)
    if not 0 < compute < math.inf:
        raise ModeclipError(f"scaling: {where}: compute: expected floating-point operations above 0, got {compute:g}")
    seed = row.get("seed")
    if isinstance(seed, list | dict):
        raise ModeclipError(f"scaling: {where}: seed: expected a number or a name, got {seed!r:.60}")
    if not 0 < error <= 1:
        raise ModeclipError(
            f"scaling: {where}: error: expected a fraction above 0 and at most 1 (accuracy: from 0 to below 1, not "
            f"percent), got {error:g}"
        )
    return (row["name"], row["family"], compute), seed, error


def _number(row: dict[str, Any], field: str, where: str) -> float:
    value = row[field]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ModeclipError(f"scaling: {where}: {field}: expected a number, got {value!r:.60}")
    return float(value)
