"""How long `modeclip evaluate` takes for a mixture, compared with CLIP_benchmark on its experts one after another.

    python benchmarks/evaluate.py BUNDLE TASKS.lance                three rounds
    python benchmarks/evaluate.py BUNDLE TASKS.lance --rounds 5

Both evaluate all tasks of the catalog, zero-shot, with one template. CLIP_benchmark gets the tasks in its webdataset
layout (PNGs of the same pixels), written before anything is timed. It is started once for each expert with all tasks,
so it pays for its imports once for each expert. Whole commands are timed, process starts included on both sides; the
ratio without starts subtracts the time of processes that only import what these commands do. CLIP_benchmark has the
settings that suit it on a CPU: batches of 512, no worker processes (small tasks would wait for them), float32. Ours
runs in float32, which is its default, and with ``--precision auto``: bfloat16 where the processor multiplies it. It
starts without any kept features. The rounds alternate, and the ratio is the median of the rounds' ratios. Each
expert's acc1 must be equal on both sides; for this, ours evaluates the experts too, after the timing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

BAR = 0.15
PRECISIONS = ("32-true", "auto")
"""Of modeclip; the second is bfloat16 on a processor that multiplies it."""
BATCH_SIZE = 512
TOLERANCE = 0.002
"""Largest difference of acc1 that the rounding of nearly equal cosines explains."""
PEER = """
import sys, torch
from clip_benchmark import cli
from clip_benchmark.metrics import zeroshot_classification as z
def accuracy(output, target, topk=(1,)):  # its own makes numbers of arrays of one element: an error since NumPy 2.4
    best = output.topk(max(topk), dim=1).indices
    return [float((best[:, :k] == target[:, None]).any(dim=1).double().mean()) for k in topk]
z.accuracy = accuracy
cli.main()
"""


IMPORTS = (
    "import modeclip.commands.evaluation, modeclip.evaluation.systems, modeclip.data.tasks.open, lance, torch\n"
    "from modeclip.models.clip import imagenet_words\n"
    "imagenet_words()",
    "import clip_benchmark.cli",
)
"""What the two commands import; the last line of ours imports open_clip as ours does."""


def machine() -> str:
    """Return the processor's name, cores, and the threads that may be used."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"


def export_tasks(catalog: Path, folder: Path) -> dict[str, int]:
    """Write the tasks of a catalog in CLIP_benchmark's webdataset layout, into folders 0, 1...; return their sizes."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.tasks.task import catalog_tasks

    opened, sizes = Catalog.open(str(catalog)), {}
    for task in catalog_tasks(opened):
        place = folder / str(len(sizes)) / "test"
        place.mkdir(parents=True)
        (place / "nshards.txt").write_text("1\n")
        (place.parent / "classnames.txt").write_text("\n".join(task.classnames) + "\n")
        (place.parent / "zeroshot_classification_templates.txt").write_text("{c}\n")
        with tarfile.open(place / "0.tar", "w") as tar:
            for number, label in enumerate(task.labels.tolist()):
                (picture,) = task.images.read(np.array([number]))
                picture.save(buffer := io.BytesIO(), "PNG")
                for name, content in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"s{number:07}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        sizes[task.name] = len(task.images)
    return sizes


def timed(command: Sequence[str]) -> np.ndarray:
    """Run a command and return its seconds, by the clock and of the processor."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:300]}\n{done.stderr[-2000:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return np.array([seconds, used])


def run_peer(bundle: Path, experts: Sequence[str], layout: Path, num_tasks: int, out: Path) -> np.ndarray:
    """Run CLIP_benchmark on each expert."""
    seconds = np.zeros(2)
    for expert in experts:
        command = [sys.executable, "-c", PEER, "eval", "--model", f"local-dir:{bundle / expert}", "--pretrained", ""]
        command += ["--dataset", *(f"wds/{task}" for task in range(num_tasks)), "--output"]
        command += [f"{out}/{expert}--{{dataset}}.json", "--dataset_root", f"{layout}/{{dataset}}", "--no_amp"]
        command += ["--num_workers", "0", "--batch_size", str(BATCH_SIZE), "--quiet"]
        seconds += timed(command)
    return seconds


def shown(seconds: np.ndarray) -> str:
    """Return the seconds of all as text."""
    names = (*(f"modeclip {precision}" for precision in PRECISIONS), "CLIP_benchmark")
    return ", ".join(f"{name} {wall:.1f} s ({cpu:.1f} CPU s)" for name, (wall, cpu) in zip(names, seconds, strict=True))


def run_ours(models: Sequence[str], tasks: Path, out: Path, precision: str) -> np.ndarray:
    """Run `modeclip evaluate` with an empty cache."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["evaluate", *models, "--tasks", str(tasks), "--out", str(out), "--precision", precision]
    return timed([sys.executable, "-m", "modeclip", *words])


def largest_difference(
    bundle: Path, experts: Sequence[str], tasks: Path, names: Sequence[str], work: Path, precision: str
) -> float:
    """Return the largest difference of acc1 between the two, over experts and tasks."""
    run_ours([f"{expert}={bundle}#{expert}" for expert in experts], tasks, work / "experts", precision)
    lines = (work / "experts" / "results.jsonl").read_text().splitlines()
    found = {(r["model"], r["dataset"]): r["metrics"]["acc1"] for r in map(json.loads, lines)}
    differences = []
    for (expert, task), accuracy in found.items():
        theirs = json.loads((work / "peer" / f"{expert}--{names.index(task)}.json").read_text())
        differences.append(abs(theirs["metrics"]["acc1"] - accuracy))
    return max(differences)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tasks", type=Path, help="task catalog, such as tasks.lance of a run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    bundle, tasks = arguments.bundle.resolve(), arguments.tasks.resolve()
    manifest = json.loads((bundle / "mode.json").read_text(encoding="utf-8"))
    experts = [expert["folder"] for expert in manifest["experts"]]

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "peer").mkdir()
        sizes = export_tasks(tasks, work / "layout")
        names = list(sizes)
        print(f"{datetime.now(UTC).date()}, {machine()}, load {os.getloadavg()[0]:.1f} at the start")
        print(f"{len(experts)} experts, {len(sizes)} tasks, {sum(sizes.values()):,} images, rule {manifest['rule']}")
        ours, theirs = (timed([sys.executable, "-c", imports]) for imports in IMPORTS)
        starts = np.array([*(ours for _ in PRECISIONS), theirs * len(experts)])
        rounds = []
        for number in range(arguments.rounds):
            runs = [
                *(partial(run_ours, [str(bundle)], tasks, work / "ours", precision) for precision in PRECISIONS),
                partial(run_peer, bundle, experts, work / "layout", len(names), work / "peer"),
            ]
            order = range(len(runs)) if number % 2 == 0 else range(len(runs) - 1, -1, -1)
            seconds = np.zeros((len(runs), 2))
            for index in order:
                seconds[index] = runs[index]()
            rounds.append(seconds)
            print(f"  round {number + 1}: {shown(seconds)}", flush=True)
        differences = [largest_difference(bundle, experts, tasks, names, work, precision) for precision in PRECISIONS]
    table = np.array(rounds)
    ratios = np.median(table[:, :-1] / table[:, -1:], axis=0)
    without = np.median((table - starts)[:, :-1] / (table - starts)[:, -1:], axis=0)
    print(f"starts: {shown(starts)}")
    for index, precision in enumerate(PRECISIONS):
        result = {
            "benchmark": "evaluate",
            "precision": precision,
            "ratio": round(float(ratios[index, 0]), 3),
            "ratio_without_starts": round(float(without[index, 0]), 3),
            "ratio_of_cpu_time": round(float(ratios[index, 1]), 3),
            "ratio_of_cpu_time_without_starts": round(float(without[index, 1]), 3),
            "bar": BAR,
            "largest_difference_of_acc1": differences[index],
            "met": bool(max(ratios[index, 0], without[index, 0]) <= BAR and differences[index] <= TOLERANCE),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
