"""The commands that judge models: evaluate on tasks, compare the predictions of two, fit scaling laws (scaling)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.data.images import Exif
from modeclip.errors import ModeclipError, in_one_line
from modeclip.evaluation.evaluate import EvaluateConfig
from modeclip.evaluation.scaling import ScalingConfig
from modeclip.system.console import log, print_json, print_lines, print_table
from modeclip.system.options import AsJson, Mask, MaxMemory, UserEncoder, Where, to_bytes

if TYPE_CHECKING:
    from modeclip.evaluation.evaluate import Average
    from modeclip.evaluation.intervals import Interval, Outcome, PairedTest
    from modeclip.evaluation.results import Result
    from modeclip.evaluation.scaling import ScalingResult

Models = Positional[
    Annotated[
        tuple[str, ...],
        arg(
            metavar="MODEL...",
            help="Bundles, BUNDLE#expert-0, BUNDLE#seed, model folders, NAME@TAG; NAME=MODEL renames one.",
        ),
    ]
]
Tasks = Annotated[
    tuple[str, ...],
    arg(help="Folders, tables, catalogs, or published tasks and groups (tasks26, robustness); NAME=PATH renames one."),
]
Folder = Positional[Annotated[Path, arg(help="Run, or folder that `modeclip evaluate --out` wrote.")]]
Results = Positional[
    Annotated[
        tuple[Path, ...],
        arg(
            metavar="RESULTS...",
            help="Folders that `modeclip evaluate` wrote, runs, or files of JSON lines: name, "
            "family (dense, mode-4, ...), compute in FLOPs (or flops_per_sample and "
            "samples), error (or accuracy) as a fraction, seed.",
        ),
    ]
]
CACHE_FOLDER = "features"
"""Folder of the results that holds the features, unless another is named."""


def evaluate(
    models: Models,
    config: Annotated[OmitArgPrefixes[EvaluateConfig], arg(name="evaluation")],
    *,
    tasks: Tasks,
    where: Where = (),
    mask: Mask = None,
    data: Annotated[str, arg(help="Folder that holds the data of published tasks, each in a folder of its name.")] = (
        "data"
    ),
    rule: Annotated[
        tuple[str, ...],
        arg(
            help="Routing rules of the mixtures; with several, each mixture is a model for each rule. Default: each "
            "bundle's own."
        ),
    ] = (),
    temperature: Annotated[
        float | None, arg(help="Temperature of the rule; default: the bundle's, or the rule's own.")
    ] = None,
    max_experts: Annotated[int | None, arg(help="Experts that a task may use; default: all.")] = None,
    max_memory: MaxMemory = None,
    bounds: Annotated[
        bool,
        arg(
            help="Show the best single expert of each mixture and its oracle, which the labels choose; all experts run."
        ),
    ] = False,
    random_weights: Annotated[
        bool, arg(help="Evaluate a model that names no weights (ViT-B-32) with random ones, which is refused else.")
    ] = False,
    encoder: UserEncoder = None,
    cache: Annotated[
        Path | None, arg(help="Folder where features are kept; default: features in the folder of the results.")
    ] = None,
    out: Annotated[Path, arg(help="Folder of the results: JSON, JSON lines, predictions as Parquet.")] = Path(
        "evaluation"
    ),
    exif: Annotated[
        Exif,
        arg(
            help="Turn images of files and tables upright as their EXIF data say (apply), or not (ignore), as "
            "CLIP_benchmark; catalogs say so themselves."
        ),
    ] = "apply",
    as_json: AsJson = False,
) -> None:
    """Compare models on tasks: zero-shot classification, retrieval, image-caption selection, linear probes."""
    from modeclip.data.selection import Selection
    from modeclip.data.tasks.open import load_tasks
    from modeclip.evaluation.evaluate import averages
    from modeclip.evaluation.evaluate import evaluate as run_evaluate
    from modeclip.evaluation.results import read_results, write_results
    from modeclip.evaluation.systems import open_systems
    from modeclip.models.clip import imagenet_words
    from modeclip.models.feature_cache import FeatureCache
    from modeclip.system.files import writing

    if not tasks:
        raise ModeclipError("evaluate: no task given; give --tasks with folders, tables, catalogs or published names")
    read_results(out)  # results that cannot be read are found now, not after all the work
    loaded = load_tasks(
        tasks,
        templates=config.templates,
        root=data,
        train=config.probe,
        imagenet=imagenet_words,
        exif=exif,
        selection=Selection(where=where, mask=mask),
    )
    unprobed = [repr(task.name) for task in loaded if task.kind == "classification" and task.train is None]
    if config.probe and unprobed:
        log(f"no linear probe of {', '.join(unprobed)}: there are no training images (a folder train beside test)")
    kept = FeatureCache(cache or out / CACHE_FOLDER)
    systems = open_systems(
        models,
        kept,
        rules=rule,
        temperature=temperature,
        max_experts=max_experts,
        max_memory=to_bytes(max_memory),
        bounds=bounds,
        random_weights=random_weights,
        encoder=encoder,
    )
    with writing(kept.folder):  # a place that cannot be written to is found now, not after all the work
        kept.folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []

    def keep(found: list[Result]) -> None:
        try:
            write_results(out, found)
        except (ModeclipError, OSError) as error:
            fail(in_one_line(error) if isinstance(error, OSError) else str(error))

    def fail(problem: str) -> None:
        log(problem)
        problems.append(problem)

    results = run_evaluate(systems, loaded, config, kept, done=keep, failed=fail)
    means = averages(results)
    if as_json:
        records = [
            {"task": result.task.name, "kind": result.kind, "system": result.system}
            | {"main": result.outcome.main, "metrics": dict(result.outcome.metrics)}
            | dict(result.provenance)
            for result in results
        ]
        content = {"results": records, "averages": [asdict(mean) for mean in means], "folder": str(out)}
        print_json(content | {"failed": problems})
    else:
        hidden = {system.name for system in systems if not system.is_given}
        shown = [result for result in results if result.system not in hidden]
        _print_results(shown, means)
        _print_guesses(shown)
        print_lines(f"results: {out}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ModeclipError(
            f"evaluate: {count}, named above; all other results are in {out}; mend what is named and give the same "
            "command again"
        )


def compare(
    first: Folder,
    second: Folder,
    first_system: Annotated[
        str | None, arg(help="Model in the first folder; default: its only one, or a run's mixture.")
    ] = None,
    second_system: Annotated[
        str | None, arg(help="Model in the second folder; default: its only one, or a run's mixture.")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Compare two models by their predictions, without running them: paired intervals and exact McNemar tests."""
    from modeclip.evaluation.results import compare as run_compare

    found = run_compare(first, second, first_system=first_system, second_system=second_system)
    if as_json:
        print_json(asdict(found))
        return
    rows = [
        (
            task.task,
            task.metric,
            f"{100 * task.first:.1f}",
            f"{100 * task.second:.1f}",
            *_cells(task.difference, task.test),
        )
        for task in found.tasks
    ]
    means = (sum(side) / len(found.tasks) for side in zip(*((t.first, t.second) for t in found.tasks), strict=True))
    label = f"average of tasks ({len(rows)})"
    rows.append((label, "", *(f"{100 * mean:.1f}" for mean in means), *_cells(found.difference, found.test)))
    columns = ["task", "metric", found.first, found.second, "difference", "95 %", "only first, second", "McNemar p"]
    print_table(
        "in %; difference with its bootstrap interval over the same samples of each task", columns, rows, in_parts=True
    )
    if found.left_out:
        print_lines(f"only in one of them: {', '.join(found.left_out)}")


def scaling(
    results: Results,
    config: Annotated[OmitArgPrefixes[ScalingConfig], arg(name="fitting")],
    *,
    out: Annotated[Path | None, arg(help="Folder for scaling.html, scaling.svg and scaling.json.")] = None,
    what: Annotated[str, arg(help="What the error is, as the picture names it.")] = "error",
    family: Annotated[
        tuple[str, ...],
        arg(metavar="MODEL=NAME", help="Family of an evaluated model; default: mixture if it is routed, else dense."),
    ] = (),
    compute: Annotated[
        tuple[str, ...],
        arg(metavar="MODEL=FLOPS", help="Floating-point operations of the whole training of an evaluated model."),
    ] = (),
    flops_per_sample: Annotated[
        tuple[str, ...],
        arg(metavar="MODEL=FLOPS", help="The same of one sample, where the results know the number of samples."),
    ] = (),
    as_json: AsJson = False,
) -> None:
    """Fit error = A * compute^(-b) to results of several sizes and budgets, a law for each family, with intervals."""
    from modeclip.evaluation.scaling import fit_scaling, read_points
    from modeclip.pages.scaling_page import RESULT_FILE, write_scaling
    from modeclip.system.files import write_json

    points = read_points(
        results,
        families=_of_models("--family", family),
        compute=_flops_of_models("--compute", compute),
        flops_per_sample=_flops_of_models("--flops-per-sample", flops_per_sample),
    )
    result = fit_scaling(points, config)
    pages = write_scaling(result, out, what) if out is not None else ()
    if out is not None:
        write_json(out / RESULT_FILE, asdict(result))
    if as_json:
        print_json(asdict(result))
        return
    print_table(*_law_table(result))
    for page in pages:
        print_lines(page)


def _of_models(option: str, words: Sequence[str]) -> dict[str, str]:
    """Return the values of words such as ``MODEL=VALUE``; a model's name may have ``=`` in it."""
    found = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        if not (name and equals and value):
            raise ModeclipError(f"{option} {word!r}: expected MODEL=VALUE")
        found[name] = value
    return found


def _flops_of_models(option: str, words: Sequence[str]) -> dict[str, float]:
    """Return the numbers of words such as ``MODEL=1.8e7``."""
    found = {}
    for name, value in _of_models(option, words).items():
        try:
            found[name] = float(value)
        except ValueError:
            raise ModeclipError(f"{option} {name}={value}: expected a number such as 1.8e7") from None
    return found


def _print_results(results: Sequence[Result], means: Sequence[Average]) -> None:
    """Print a table for each kind and group of tasks."""
    for kind, group in dict.fromkeys((result.kind, result.task.group) for result in results):
        own = [result for result in results if (result.kind, result.task.group) == (kind, group)]
        of_system = {mean.system: mean for mean in means if (mean.kind, mean.group) == (kind, group)}
        systems = dict.fromkeys(result.system for result in own)
        print_table(*_result_table(own, [of_system[system] for system in systems]), in_parts=True)


def _print_guesses(results: Sequence[Result]) -> None:
    """Print of which tasks a router has no captions that are near, each once."""
    from modeclip.mixture.explain import far_from

    guessed: dict[str, Result] = {}
    for result in results:
        if result.provenance.get("out_of_domain"):
            guessed.setdefault(result.task.name, result)
    for name, result in guessed.items():
        domain = result.provenance["domain"]
        print_lines(
            f"{name} is out of domain: {domain['names_out']:,} of {domain['names']:,} names lie farther from "
            f"{far_from(domain.get('nearest'))}, so the router of {result.system} can only guess"
        )


def _result_table(results: Sequence[Result], means: Sequence[Average]) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows for tasks of one kind and group: a row for each model of ``means``."""
    kind, group = results[0].kind, results[0].task.group
    of_place = {(result.system, result.task.name): result.outcome for result in results}
    metrics: dict[str, list[str]] = {}
    for result in results:
        single = kind in {"classification", "linear_probe"}
        metrics[result.task.name] = [result.outcome.main] if single else list(result.outcome.metrics)
    several = len({metric for of_task in metrics.values() for metric in of_task}) > 1
    averages = {
        f"average of {len(metrics)}": [f"{100 * mean.score.mean:.1f}" for mean in means],
        "95 %": [_percent(mean.score) for mean in means],
        "minus first": [_points(mean.versus_first) for mean in means],
        "its 95 %": [_percent(mean.versus_first) for mean in means],
        "McNemar p": [f"{mean.test.p_value:.2g}" if mean.test else "" for mean in means],
    }
    if len(metrics) == 1 and not several:  # the average is the task's own column
        del averages["average of 1"]
    scores = {
        f"{task}\n{metric}" if several else task: [_score(of_place.get((mean.system, task)), metric) for mean in means]
        for task, of_task in metrics.items()
        for metric in of_task
    }
    shown = {name: cells for name, cells in averages.items() if any(cells)}
    columns = (scores | shown) if len(metrics) == 1 else (shown | scores)
    incomplete = [mean for mean in means if len(mean.tasks) < len(metrics)]
    what = kind.replace("_", " ") + (f", {group}" if group else "")
    title = (
        f"{what} in %, {'' if several else f'{next(iter(metrics.values()))[0]}, '}95 % by a bootstrap over the samples"
    )
    title += f"; {len(incomplete)} models lack tasks and have another average" if incomplete else ""
    rows = [[mean.system, *row] for mean, row in zip(means, zip(*columns.values(), strict=True), strict=True)]
    if kind in {"classification", "linear_probe"} and all(of_task == ["acc1"] for of_task in metrics.values()):
        tasks = {result.task.name: result.task for result in results}
        baselines = {"majority class": [task.majority for task in tasks.values()]}
        baselines["chance"] = [task.chance for task in tasks.values()]
        for name, values in baselines.items():
            known = [value for value in values if value is not None]
            cells = dict(zip(tasks, (f"{100 * value:.1f}" for value in known), strict=True))
            cells[f"average of {len(metrics)}"] = f"{100 * sum(known) / len(known):.1f}"
            rows.append([name, *(cells.get(column, "") for column in columns)])
    return title, ["model", *columns], rows


def _score(outcome: Outcome | None, metric: str) -> str:
    return "" if outcome is None else f"{100 * outcome.metrics[metric]:.1f}"


def _percent(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _points(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.mean:+.1f}"


def _cells(difference: Interval, test: PairedTest | None) -> tuple[str, ...]:
    cells = (f"{100 * difference.mean:+.1f}", f"{100 * difference.low:.1f} to {100 * difference.high:.1f}")
    return (*cells, f"{test.only_first}, {test.only_second}", f"{test.p_value:.2g}") if test else (*cells, "", "")


def _law_table(result: ScalingResult) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows of what is printed."""
    reference = result.laws[0].family
    rows = [
        [
            law.family,
            f"{law.num_points} of {sum(point.family == law.family for point in result.points)}",
            _with_ends(law.A, "{:.3g}"),
            _with_ends(law.b, "{:.3f}"),
            _with_ends(law.best_error, "{:.1%}"),
            "" if law.compute_ratio is None else _with_ends(law.compute_ratio, "{:.0%}"),
        ]
        for law in result.laws
    ]
    columns = ["family", "points", "A", "b", "error at its largest compute", f"compute for {reference}'s error"]
    where = "the Pareto frontier" if result.config.points == "frontier" else "all points"
    return f"error = A * compute^(-b), fitted to {where}", columns, rows


def _with_ends(interval: Interval, form: str) -> str:
    return f"{form.format(interval.mean)} ({form.format(interval.low)} to {form.format(interval.high)})"
