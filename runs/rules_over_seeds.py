"""What does the demo's recipe say over several seeds: does an expert for known names pay, and which rule is best?

One more expert is trained beside the recipe's models, for the names that the demo's pilot asks about.

Usage: python runs/rules_over_seeds.py [--seeds 0 1 2] [--out runs/seeds] [--record runs/demo.jsonl]
       python runs/rules_over_seeds.py --model modeclip-icon-xs --samples 131072 --out runs/short \
           --record runs/demo_short.jsonl

A seed decides the clusters, the random start, the order of the samples and the crops. Every seed is a run folder of
its own, resumable like any other; about ten minutes each on two cores. Prints the decision over all seeds and a
Markdown table: for each row of the result table its average accuracy (mean and standard deviation over the seeds), and
its distance from the dense model at equal cost and from the uniform ensemble, with the half width of a 95 % t-interval
over the seeds. The record has a line for each seed and one of the decision; `runs/results.py` makes the sentences of
README.md and docs/ from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from modeclip import load_recipe, run
from modeclip.commands.pilot import NAMES
from modeclip.data.tasks.names import CLASS_NAMES
from modeclip.evaluation.deciding import DENSE, OF_NAMES, Way, average_gains, caution, decide, gains_of
from modeclip.evaluation.intervals import Outcome
from modeclip.evaluation.results import read_predictions
from modeclip.pipeline import known_names
from modeclip.pipeline.known_names import ALL_NAMES, REMEDY
from modeclip.pipeline.recipe import demo_recipe
from modeclip.system.paths import RunPaths

NEAREST = 4
"""Clusters that each name takes: a quarter of the pairs; with one each, a tenth, the expert was worse (docs/log.md)."""


def run_seed(seed: int, out: Path, **train: Any) -> dict[str, Any]:
    """Run the demo's recipe with a seed, and with other settings of the training; return its ``results.json``."""
    recipe = load_recipe(demo_recipe())
    training = replace(recipe.train, seed=seed, **train)
    experts = replace(recipe.experts, for_classes=tuple(NAMES.split(",")), nearest=NEAREST)
    recipe = replace(recipe, cluster=replace(recipe.cluster, seed=seed), train=training, experts=experts)
    return run(recipe, folder_of(seed, out)).results


def folder_of(seed: int, out: Path) -> Path:
    """Return the run folder of a seed."""
    return out / f"seed-{seed}"


def averages(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the average accuracy of each row in percent."""
    rows = results["models"]
    return {f"{row['name']}, {row['rule']}" if row["rule"] else row["name"]: 100 * row["average"] for row in rows}


def decision_over(runs: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> dict[str, Any]:
    """Return the decision over several seeds, with the intervals and the rule of `modeclip.evaluation.deciding`."""
    first = runs[0]["decision"]
    answers: dict[str, list[Outcome]] = {row["name"]: [] for row in first["rows"]}
    elsewhere: dict[str, list[dict[str, Outcome]]] = {row["name"]: [] for row in first["rows"]}
    for folder, results in zip(folders, runs, strict=True):
        paths = RunPaths(folder=folder)
        asked = {one.system: one.outcome for one in read_predictions(paths.names_answers)}
        tasks: dict[str, dict[str, Outcome]] = {}
        for one in read_predictions(paths.answers):
            tasks.setdefault(one.system, {})[one.task] = one.outcome
        for row in results["decision"]["rows"]:
            answers[row["name"]].append(asked[row["model"]])
            elsewhere[row["name"]].append(tasks[row["model"]])
    ways = [Way(name=row["name"], title=row["title"], towers=row["towers"]) for row in first["rows"]]
    gains = {CLASS_NAMES: gains_of(answers), ALL_NAMES: average_gains(elsewhere)}
    verdict = decide(ways, gains[CLASS_NAMES], answers[DENSE], chance=first["chance"], measure=OF_NAMES, remedy=REMEDY)
    rows = []
    for number, way in enumerate(ways):
        each = [results["decision"]["rows"][number] for results in runs]
        rows.append(
            each[0]
            | {
                "gain": {name: asdict(found[way.name]) for name, found in gains.items() if way.name in found},
                "score": {name: float(np.mean([row["score"][name] for row in each])) for name in gains},
                "seconds": float(np.mean([row["seconds"] for row in each])),
            }
        )
    own = next(way for way in ways if way.name == known_names.NAMES)
    said = caution(own, gains[ALL_NAMES][known_names.NAMES], verdict.choice)
    return first | {"verdict": asdict(verdict), "caution": said, "rows": rows, "seeds": len(runs)}


def difference(one: list[float], other: list[float]) -> str:
    """Return the mean difference with the half width of its 95 % interval over the seeds."""
    gains = np.subtract(one, other)
    half = t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{gains.mean():+.1f} ± {half:.1f}"


def main() -> None:
    """Run the seeds that are missing, print the decision and the table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--model", help="Towers; those of the demo by default.")
    parser.add_argument("--samples", type=int, help="Of the dense model; those of the demo by default.")
    parser.add_argument("--record", type=Path, help="JSON lines; none is written by default.")
    arguments = parser.parse_args()
    train = {name: value for name in ("model", "samples") if (value := getattr(arguments, name))}
    runs = [run_seed(seed, arguments.out, **train) for seed in arguments.seeds]
    rows = [averages(results) for results in runs]
    columns = {name: [found[name] for found in rows] for name in rows[0]}
    dense, uniform = columns.get("dense-total", columns["dense"]), columns["mixture, uniform"]
    decision = decision_over(runs, [folder_of(seed, arguments.out) for seed in arguments.seeds])
    print(f"\nseeds {arguments.seeds}, {runs[0]['machine']['processor']}\n\n{decision['verdict']['sentence']}")
    print(f"{decision['caution']}\n\naccuracy in %\n")
    print("| model | average | against dense at equal cost | against uniform |\n|---|---|---|---|")
    for name, values in columns.items():
        spread = f"{np.mean(values):.1f} (sd {np.std(values, ddof=1 if len(values) > 1 else 0):.1f})"
        print(f"| {name} | {spread} | {difference(values, dense)} | {difference(values, uniform)} |")
    if arguments.record:
        lines: list[dict[str, Any]] = [
            {
                **{name: results[name] for name in ("seed", "date", "machine", "decision")},
                "average": found,
                "stages": {
                    path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"]
                    for path in sorted(RunPaths(folder=folder_of(results["seed"], arguments.out)).stages.glob("*.json"))
                },
            }
            for results, found in zip(runs, rows, strict=True)
        ]
        lines.append({"seeds": arguments.seeds, "decision": decision})
        arguments.record.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
