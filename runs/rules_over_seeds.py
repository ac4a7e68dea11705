"""Which routing rule is best, and does the mixture beat a dense model of its cost? The demo over several seeds.

Usage: python runs/rules_over_seeds.py [--seeds 0 1 2] [--out runs/seeds]

A seed decides the clusters, the random start, the order of the samples and the crops. Every seed is a run folder of
its own, resumable like any other; about ten minutes each on two cores. Prints a Markdown table: for each row of the
result table its average accuracy (mean and standard deviation over the seeds), and its distance from the dense model
at equal cost and from the uniform ensemble, with the half width of a 95 % t-interval over the seeds.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.stats import t

from modeclip import load_recipe, run
from modeclip.pipeline.recipe import demo_recipe


def averages(seed: int, out: Path) -> dict[str, float]:
    """Run the demo's recipe with a seed; return the average accuracy of each row in percent."""
    recipe = load_recipe(demo_recipe())
    recipe = replace(recipe, cluster=replace(recipe.cluster, seed=seed), train=replace(recipe.train, seed=seed))
    rows = run(recipe, out / f"seed-{seed}").results["models"]
    return {f"{row['name']}, {row['rule']}" if row["rule"] else row["name"]: 100 * row["average"] for row in rows}


def difference(one: list[float], other: list[float]) -> str:
    """Return the mean difference with the half width of its 95 % interval over the seeds."""
    gains = np.subtract(one, other)
    half = t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{gains.mean():+.1f} ± {half:.1f}"


def main() -> None:
    """Run the seeds that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args()
    runs = [averages(seed, arguments.out) for seed in arguments.seeds]
    columns = {name: [found[name] for found in runs] for name in runs[0]}
    dense, uniform = columns.get("dense-total", columns["dense"]), columns["mixture, uniform"]
    date = datetime.now(UTC).date().isoformat()
    print(f"\nseeds {arguments.seeds}, {date}, {platform.machine()}, accuracy in %\n")
    print("| model | average | against dense at equal cost | against uniform |\n|---|---|---|---|")
    for name, values in columns.items():
        spread = f"{np.mean(values):.1f} (sd {np.std(values, ddof=1 if len(values) > 1 else 0):.1f})"
        print(f"| {name} | {spread} | {difference(values, dense)} | {difference(values, uniform)} |")


if __name__ == "__main__":
    main()
