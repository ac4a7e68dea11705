"""The commands of whole runs: run a recipe, and write a run's report again."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from modeclip.system.console import in_points, log, print_json, print_lines, print_table
from modeclip.system.files import read_json
from modeclip.system.options import AsJson, UserEncoder
from modeclip.system.paths import RunPaths

if TYPE_CHECKING:
    from modeclip.pipeline.planning import RunPlan
    from modeclip.pipeline.stages import RunResult


def run(
    recipe: Positional[Annotated[Path, arg(help="Recipe (YAML); docs/own-data.md has every field.")]],
    out: Annotated[Path | None, arg(help="Folder of the run; default: runs/NAME.")] = None,
    *,
    plan: Annotated[bool, arg(help="Say which stages and models there are and what they cost, and stop.")] = False,
    encoder: UserEncoder = None,
    as_json: AsJson = False,
) -> None:
    """Run the stages of a recipe that are not done yet; a killed run continues where it was."""
    from modeclip.pipeline.recipe import load_recipe

    loaded = load_recipe(recipe)
    if encoder is not None:
        loaded = replace(loaded, embed=replace(loaded.embed, encoder=encoder))
    out, trusts = out or Path("runs") / loaded.name, encoder is not None
    if plan:
        from modeclip.pipeline.planning import plan_run

        _print_plan(plan_run(loaded, out, trust_encoder=trusts), as_json)
        return
    from modeclip.pipeline import stages

    result = stages.run(loaded, out, trust_encoder=trusts)
    if as_json:
        print_json(result.results)
    else:
        _print_run(result)


def report(
    folder: Positional[Annotated[Path, arg(help="Folder of a run.")]],
    out: Annotated[Path | None, arg(help="The HTML file; default: report.html in the folder.")] = None,
) -> None:
    """Write the report of a run again."""
    from modeclip.pages.run_report import write_report
    from modeclip.pipeline.stages import rewrite_report

    print_lines(write_report(folder, out) if out else rewrite_report(folder))


def _print_run(result: RunResult) -> None:
    """Print what was decided, where class names were asked for, else the table; and where all of it is."""
    decision = result.results.get("decision")
    if decision is None:
        _print_results(result.results)
    else:
        _print_decision(decision, result.results["seed"])
        records = [RunPaths(folder=result.folder).stages / f"{name}.json" for name in ("embed", "cluster")]
        seconds = sum(read_json(path, dict[str, Any], "give the same run again")["seconds"] for path in records)
        print_lines(f"the same cost: as many training samples; the clusters of experts took {seconds:.0f} s besides")
    rows = len(result.results["models"])
    table = f" (every rule and every model on every held-out task, {rows} rows)" if decision else ""
    print_lines(f"bundle: {result.bundle}", f"report: {result.report}{table}")


def _print_decision(decision: dict[str, Any], seed: int) -> None:
    """Print what each way to train gains and costs, and what to train."""
    measures = list(decision["questions"])
    rows = []
    for row in decision["rows"]:
        found = []
        for measure in measures:
            found += [f"{100 * row['score'][measure]:.1f}", in_points(row["gain"].get(measure))]
        costs = (f"{row['samples']:,}", f"{row['seconds']:,.0f}", f"{row['towers']:.3g}", f"{row['megabytes']:.1f}")
        rows.append((row["title"], *found, *costs))
    asked, total = decision["questions"].values()
    title = (
        f"what to train for {len(decision['classnames'])} known names? accuracy in % on {asked:,} held-out pictures of "
        f"them, and on all {total:,} of all names; gains over one dense model of the same cost (seed {seed}; 95 % for "
        "all rows together)"
    )
    columns = [head for measure in measures for head in (measure.replace(" ", "\n"), "gain")]
    print_table(title, ["way to train", *columns, "samples", "seconds", "towers", "MB"], rows)
    print_lines(decision["verdict"]["sentence"], decision["caution"])


def _print_plan(plan: RunPlan, as_json: bool) -> None:
    """Print what a run will cost: a row for each stage, and below ``train`` one for each model."""
    from modeclip.training.status import in_words

    if as_json:
        totals = {"samples": plan.samples, "seconds": plan.seconds, "disk_bytes": plan.disk_bytes}
        print_json(asdict(plan) | totals)
        return
    rows = []
    for stage in plan.stages:
        for part in (stage, *(plan.models if stage.name == "train" else ())):
            name = stage.name if part is stage else f"  {part.name}"
            left = "" if part.seconds is None or part.is_done else in_words(part.seconds)
            size = f"{part.disk_bytes / 1e9:,.3f}" if part.disk_bytes else ""
            state = "done" if part.is_done else "to do"
            rows.append((name, state, part.detail, f"{part.samples:,}" if part.samples else "", left, size))
    rows.append(("all", "", "", f"{plan.samples:,}", in_words(plan.seconds), f"{plan.disk_bytes / 1e9:,.3f}"))
    print_table("plan", ["stage", "state", "what", "samples", "time", "disk GB"], rows)
    print_lines(plan.announcement, *plan.notes)
    if plan.disk_bytes > plan.free_bytes:
        print_lines(f"only {plan.free_bytes / 1e9:,.3f} GB are free: free some space or choose another --out")


def _print_results(results: dict[str, Any]) -> None:
    """Print accuracies in percent: the default rule beside what it is compared with. The report has all rows."""
    tasks = [task["name"] for task in results["tasks"]]
    if not tasks:
        log("no held-out tasks in the recipe (data.tasks or data.holdout_fraction): nothing was evaluated")
        return
    shown = [model for model in results["models"] if _is_compared(model)]
    rows = []
    for model in shown:
        name = f"{model['name']}, {model['rule']}" if model["rule"] else model["name"]
        low, high = model["interval"]
        entropy = f"{sum(model['entropy'].values()) / len(tasks):.2f}" if model["entropy"] else ""
        rows.append(
            (
                f"{name} *" if model["default"] else name,
                f"{model['samples']:,}",
                f"{100 * model['average']:.1f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                *(f"{100 * model['accuracy'][task]:.1f}" for task in tasks),
                entropy,
            )
        )
    for name, known in (("majority class", results.get("majority")), ("chance", results["chance"])):
        if known:
            shares = [f"{100 * known[task]:.1f}" for task in tasks]
            rows.append((name, "", f"{100 * sum(known[task] for task in tasks) / len(tasks):.1f}", "", *shares, ""))
    title = (
        f"{results['name']}: zero-shot accuracy in % on held-out tasks, seed {results['seed']} (95 %: bootstrap over "
        "the images; *: default rule; best single and oracle look at the labels)"
    )
    print_table(title, ["model", "samples", "average", "95 %", *tasks, "entropy"], rows, in_parts=True)
    if more := len(results["models"]) - len(shown):
        print_lines(f"{more} more rows, of each expert and of the other rules, are in the report")


def _is_compared(model: dict[str, Any]) -> bool:
    """Say whether readers compare a row: no expert by itself, and of the rules the default and uniform."""
    if model["kind"] == "mixture":
        return bool(model["default"]) or model["rule"] == "uniform"
    return bool(model["kind"] != "expert")
