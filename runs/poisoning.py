"""What wrong captions do to a filter (DFN), and what is left of it for the model that trains on its choice.

Usage: python runs/poisoning.py [--out runs/poisoning] [--records runs/poisoning.jsonl] [--seeds 0 1 2] [--jobs 2]
       python runs/poisoning.py --table      prints the tables from the records alone

The training icons of the demo are divided at random: on one half filters are trained, the other half is the raw pool. A
share of the captions of either half (0, 10, 30, 60 %) is wrong: they have changed places. For each share in the
filter's half, a filter is trained, and scores each raw pool by cosine and by s-CLIPLoss: how well does it find the
wrong pairs, which are known here? For each share in the raw pool, models are trained with equal samples: on the raw
pool, on what each filter chooses by cosine (as many pairs as are right), and on the pairs that are right, as an oracle
would choose. They are put to the held-out icon sets.

A cell (a filter and a pool, or a model) is a line of JSON with seed, machine and date; what is there is not measured
again, a job that was killed goes on from its last checkpoint. All 69 models of three seeds take about an hour of
processor time on the demo's data.

Source: DFN (arXiv 2309.17425), which finds that a filter of poisoned data loses its value before its own accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import machine
from scipy.stats import t

from modeclip import Catalog
from modeclip.curation.curating import curate
from modeclip.curation.dfn import DfnConfig
from modeclip.data.indexing import index
from modeclip.data.selection import ALL, Selection
from modeclip.data.sources import DataConfig
from modeclip.data.tasks.task import catalog_tasks
from modeclip.evaluation.evaluate import EvaluateConfig, evaluate
from modeclip.evaluation.systems import open_systems
from modeclip.pipeline.recipe import demo_recipe, load_recipe
from modeclip.pipeline.run_folder import single_job
from modeclip.training.jobs import AugmentConfig, TrainConfig, TrainJob
from modeclip.training.launching import run_jobs

SHARES = (0, 10, 30, 60)
SCORES = ("cosine", "sclip")
TRAIN = TrainConfig(
    model="modeclip-icon-xs",
    samples=65_536,
    batch_size=256,
    learning_rate=1e-3,
    augment=AugmentConfig(min_crop_share=0.8),
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The data and models of one random seed."""

    out: Path
    seed: int

    @property
    def folder(self) -> Path:
        """Folder of the seed."""
        return self.out / f"seed-{self.seed}"

    def pool(self, half: str, share: int) -> Catalog:
        """Return a half of the pairs with a share of wrong captions, which the column ``wrong`` marks."""
        folder = self.folder / f"{half}-{share}"
        if not (folder / "catalog.lance" / "_versions").is_dir():
            self._write(half, share, folder.with_suffix(".parquet"))
            index(DataConfig.from_flat({"source": str(folder.with_suffix(".parquet"))}), folder)
            folder.with_suffix(".parquet").unlink()
        return Catalog.open(folder)

    @cached_property
    def pairs(self) -> Catalog:
        """All training pairs."""
        return Catalog.open(self.out / "data")

    def _write(self, half: str, share: int, path: Path) -> None:
        """Write a half as a table; the wrong captions of a smaller share are wrong in a larger one, too."""
        draw = np.random.default_rng([self.seed, 1])
        order = draw.permutation(len(self.pairs))
        middle = len(order) // 2
        rows = order[:middle] if half == "filter" else order[middle:]
        captions = self.pairs.read(["caption"], rows)["caption"]
        moved = np.arange(len(rows))[: round(share / 100 * len(rows))]
        poisoned = captions.copy()
        poisoned[moved] = captions[np.roll(moved, 1)]
        table = {
            "key": pa.array(self.pairs.read(["key"], rows)["key"].tolist()),
            "image": pa.array(self.pairs.encoded_images(rows), pa.binary()),
            "caption": pa.array(poisoned.tolist()),
            "wrong": pa.array(poisoned != captions),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)

    def filter_job(self, share: int) -> TrainJob:
        """Return the training of a filter."""
        return self._job(self.pool("filter", share), f"filter-{share}")

    def models(self, share: int) -> Iterator[tuple[str, TrainJob]]:
        """Yield the name and the training of each model on the raw pool with a share of wrong captions."""
        pool = self.pool("raw", share)
        yield f"raw {share}", self._job(pool, f"raw-{share}")
        if not share:
            return
        yield f"oracle {share}", self._job(pool, f"oracle-{share}", Selection(where=("NOT wrong",)))
        for filter_share in SHARES:
            name = f"by_cosine_{filter_share}"
            config = DfnConfig(filter=self.filter_job(filter_share).folder, fraction=(1 - share / 100,))
            curate(pool, config, name=name)
            job = self._job(pool, f"choice-{filter_share}-{share}", Selection(mask=f"{name}_kept"))
            yield f"choice {filter_share} {share}", job

    def detections(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield how well each filter finds the wrong pairs of each pool."""
        for filter_share in SHARES:
            for share in SHARES[1:]:
                pool = self.pool("raw", share)
                wrong = pool.read(["wrong"])["wrong"]
                for score in SCORES:
                    config = DfnConfig(
                        filter=self.filter_job(filter_share).folder, score=score, fraction=(1 - share / 100,)
                    )
                    found = curate(pool, config, name="tried", dry_run=True)
                    dropped = ~found.column("kept")
                    yield (
                        f"{score} {filter_share} {share}",
                        {
                            "auc": auc(-found.column("score"), wrong),
                            "precision": float(wrong[dropped].mean()),
                            "recall": float(dropped[wrong].mean()),
                        },
                    )

    def _job(self, catalog: Catalog, name: str, selection: Selection = ALL) -> TrainJob:
        train = replace(TRAIN, seed=self.seed)
        return single_job(catalog, self.folder / "models" / name, train, selection=selection)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the chance that a positive has a higher score than a negative; equal scores count half.

    Examples:
        >>> auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True]))
        0.875
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    number = int(positive.sum())
    return float((ranks[positive].sum() - number * (number + 1) / 2) / (number * (len(scores) - number)))


def accuracies(out: Path, folders: list[str]) -> list[dict[str, float]]:
    """Return each model's accuracy in percent on the held-out icon sets."""
    tasks = catalog_tasks(Catalog.open(out / "data" / "tasks.lance"))
    results = evaluate(open_systems(folders), tasks, EvaluateConfig(templates=("{}",)))
    found: dict[str, dict[str, float]] = {}
    for result in results:
        found.setdefault(result.system, {})[result.task.name] = round(100 * result.outcome.metrics["acc1"], 3)
    return list(found.values())


def run(out: Path, records: Path, seeds: list[int], jobs: int) -> None:
    """Measure the cells that are missing."""
    if not (out / "data" / "catalog.lance" / "_versions").is_dir():
        index(load_recipe(demo_recipe()).data, out / "data")
    for seed in seeds:
        bench = Bench(out=out.resolve(), seed=seed)
        filters = {f"filter {share}": bench.filter_job(share) for share in SHARES}
        _train(out, records, seed, filters, jobs)
        known = {line["cell"] for line in read(records) if line["seed"] == seed}
        for cell, values in bench.detections():
            if cell not in known:
                _record(records, seed, cell, values)
        for share in SHARES:
            _train(out, records, seed, dict(bench.models(share)), jobs)


def _train(out: Path, records: Path, seed: int, models: Mapping[str, TrainJob], jobs: int) -> None:
    """Train models that are not trained yet, and record those that are not recorded."""
    run_jobs(list(models.values()), jobs)
    known = {line["cell"] for line in read(records) if line["seed"] == seed}
    missing = {cell: job for cell, job in models.items() if cell not in known}
    if missing:
        found = accuracies(out, [job.folder for job in missing.values()])
        for cell, values in zip(missing, found, strict=True):
            _record(records, seed, cell, values)


def _record(records: Path, seed: int, cell: str, values: Mapping[str, float]) -> None:
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"seed": seed, "cell": cell, "values": dict(values), **machine()}) + "\n")


def read(records: Path) -> list[dict[str, Any]]:
    """Return the lines that were recorded."""
    return [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()] if records.exists() else []


def verdict(lines: list[dict[str, Any]]) -> str:
    """Return what the tables say, in words."""
    cells = _by_cell(lines)
    if any(f"raw {share}" not in cells for share in SHARES):
        return "Not all pools are measured yet."
    areas = [float(np.mean([one["auc"] for one in cells[f"cosine {share} 30"]])) for share in SHARES]
    own = [_accuracy(cells, f"filter {share}") for share in SHARES]
    clean, raw = _accuracy(cells, "raw 0"), [_accuracy(cells, f"raw {share}") for share in SHARES[1:]]
    lost = ", ".join(f"{100 * (1 - one / clean):.0f} %" for one in raw)
    kept = {share: [_accuracy(cells, f"choice {share} {pool}") for pool in SHARES[1:]] for share in SHARES}
    always = all(one > other for choices in kept.values() for one, other in zip(choices, raw, strict=True))
    chosen = "; ".join(
        f"{', '.join(f'{100 * one / clean:.0f} %' for one in choices)} by a filter with {share} %"
        for share, choices in kept.items()
    )
    poison, pools = (", ".join(f"{share} %" for share in shares) for shares in (SHARES, SHARES[1:]))
    return (
        f"With {poison} of wrong captions in its half, a filter finds wrong pairs with an area under the curve of "
        f"{', '.join(f'{area:.2f}' for area in areas)} (cosine, 30 % wrong in the pool), and has an accuracy of "
        f"{', '.join(f'{one:.1f}' for one in own)} % itself. A model on the raw pool loses {lost} of its accuracy when "
        f"{pools} of the captions are wrong. On the choice of a filter it has, against the model of the clean pool, in "
        f"the same order: {chosen}. "
        + ("Every choice is better than its raw pool." if always else "Not every choice is better than its raw pool.")
    )


def _by_cell(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    cells: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        cells.setdefault(line["cell"], []).append(line["values"])
    return cells


def _task_mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _accuracy(cells: Mapping[str, list[dict[str, float]]], cell: str) -> float:
    return float(np.mean([_task_mean(values) for values in cells[cell]]))


def tables(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: means over the seeds with 95 % t-intervals."""
    cells = _by_cell(lines)

    def mean_of(cell: str, value: Callable[[dict[str, float]], float], digits: int) -> str:
        values = [value(one) for one in cells.get(cell, [])]
        if len(values) < 2:
            return f"{values[0]:.{digits}f}" if values else "-"
        half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"

    seeds = len({line["seed"] for line in lines})
    parts = [
        "Wrong pairs found, by their share in the raw pool: area under the curve, and recall at the known share"
        f" ({seeds} {'seed' if seeds == 1 else 'seeds'}):",
        "",
    ]
    pools = " | ".join(f"{share} %" for share in SHARES[1:])
    parts += [f"| wrong in the filter's half | own accuracy | score | {pools} |", "|---" * (len(SHARES) + 2) + "|"]
    for filter_share in SHARES:
        for score in SCORES:
            found = []
            for share in SHARES[1:]:
                cell = f"{score} {filter_share} {share}"
                names = ("auc", "recall")
                found.append("; ".join(mean_of(cell, lambda one, name=name: one[name], 3) for name in names))
            own = mean_of(f"filter {filter_share}", _task_mean, 1)
            parts.append(f"| {filter_share} % | {own} | {score} | {' | '.join(found)} |")
    parts += ["", "Accuracy on the held-out icon sets, equal training samples:", ""]
    headings = ["raw pool", *(f"choice, filter of {share} %" for share in SHARES), "oracle"]
    parts += [f"| wrong in the pool | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for share in SHARES:
        names = [f"raw {share}", *(f"choice {each} {share}" for each in SHARES), f"oracle {share}"]
        parts.append(f"| {share} % | {' | '.join(mean_of(name, _task_mean, 1) for name in names)} |")
    return "\n".join(parts)


def main() -> None:
    """Run the experiment, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/poisoning"))
    parser.add_argument("--records", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        run(given.out, given.records, given.seeds, given.jobs)
    print(tables(read(given.records)))


if __name__ == "__main__":
    main()
