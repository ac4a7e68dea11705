"""How fast ONNX graphs are, in float32 and int8, against PyTorch, and what int8 costs in accuracy.

    python benchmarks/export.py runs/demo/bundle#expert-1 --tasks runs/demo/tasks.lance
    python benchmarks/export.py runs/demo/bundle --tasks runs/demo/tasks.lance    seed and experts: accuracy alone
    python benchmarks/export.py ViT-B-32 --batch 16

Both graphs of a model are written as `modeclip export` writes them, and int8 beside them, faster or not. The same batch
runs in turn, in each round in another order, through PyTorch as modeclip runs a model, through the float32
graph and through the int8 graph in ONNX Runtime, with as many threads. Seconds are those of the processor, which a busy
machine changes least; the figures are medians of the rounds' ratios to PyTorch. A name without weights has random ones
(seed 0), which cost the same. With tasks, all three are scored on the same images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from evaluate import machine

from modeclip.adapting.merging import find_model, list_models
from modeclip.adapting.validation import Examiner, open_tasks
from modeclip.mixture.manifest import MANIFEST_FILE, SEED
from modeclip.models.clip import Clip, load_clip, without_gradients
from modeclip.models.export.onnx import INPUTS, compare, open_session, quantize, save_onnx, with_graphs
from modeclip.models.trunk import encode
from modeclip.training.jobs import brings_weights

TEXTS = ("a picture of a heart", "an arrow that points to the left", "x", "two dogs")


def main() -> None:
    """Write the graphs, run them and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model, BUNDLE#expert-1, or a bundle")
    parser.add_argument("--tasks", help="held-out tasks to score the graphs on")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    examiner = open_tasks(arguments.tasks, ("{}",), 256) if arguments.tasks else None
    is_bundle = (Path(arguments.model) / MANIFEST_FILE).is_file()
    print(f"{datetime.now(UTC).date()}, {machine()}, batches of {arguments.batch}, {arguments.rounds} rounds, seed 0")
    if not is_bundle:
        has_weights = brings_weights(arguments.model) or "#" in arguments.model
        spec = find_model(arguments.model, "benchmark") if has_weights else arguments.model
        measure(load_clip(spec, seed=None if has_weights else 0), arguments, examiner)
        return
    members = [(SEED, f"{arguments.model}#{SEED}"), *list_models([arguments.model])[0]]
    for name, spec in members:
        print(name)
        measure(load_clip(find_model(spec, "benchmark")), arguments, examiner, speed=False)


def measure(clip: Clip, arguments: argparse.Namespace, examiner: Examiner | None, *, speed: bool = True) -> None:
    """Print the speed of a model's graphs, and their accuracy if there are tasks."""
    clip.model.eval()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_onnx([clip], folder)
        graphs = {kind: {tower: folder / f"{tower}{kind}.onnx" for tower in INPUTS} for kind in ("", ".int8")}
        for tower in INPUTS:
            quantize(graphs[""][tower], graphs[".int8"][tower])
            if speed:
                show_speed(clip, tower, graphs[""][tower], graphs[".int8"][tower], arguments)
        if examiner is None:
            return
        answers = {"PyTorch": clip, "ONNX": with_graphs(clip, graphs[""]), "int8": with_graphs(clip, graphs[".int8"])}
        scores = {name: examiner.examine(one) for name, one in answers.items()}
        for task in scores["PyTorch"]:
            cells = ", ".join(f"{name} {100 * found[task].score:.2f}" for name, found in scores.items())
            print(f"  {task}, {len(scores['PyTorch'][task].hits):,} images: accuracy in %: {cells}")
        means = {name: 100 * float(np.mean([one.score for one in found.values()])) for name, found in scores.items()}
        hits = {name: np.concatenate([one.hits for one in found.values()]) for name, found in scores.items()}
        changed = float(np.mean(hits["int8"] != hits["PyTorch"]))
        cells = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        print(f"  mean over tasks: {cells}; int8 answers {100 * changed:.1f} % of the images otherwise right or wrong")


def show_speed(clip: Clip, tower: str, plain: Path, low: Path, arguments: argparse.Namespace) -> None:
    """Print the seconds of a tower's graphs as ratios to PyTorch's."""
    if tower == "image":
        width, height = clip.image_size
        x = torch.randn(arguments.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    else:
        x = clip.tokens([TEXTS[index % len(TEXTS)] for index in range(arguments.batch)])
        x = x[:, : int((x != 0).any(dim=0).nonzero().max()) + 1]
    ways: dict[str, Callable[[], object]] = {
        "PyTorch": lambda: encode(clip.model, tower, x),
        "every token": lambda: encode(clip.model, tower, x, every_token=True),
    }
    for name, path in (("ONNX", plain), ("int8", low)):
        session = open_session(path)
        ways[name] = lambda session=session: session.run(None, {INPUTS[tower]: x.numpy()})
    table = []
    with without_gradients():
        for way in ways.values():
            way()
        for number in range(arguments.rounds):
            seconds = {}
            for name in list(ways) if number % 2 == 0 else list(reversed(ways)):
                before = time.process_time()
                ways[name]()
                seconds[name] = time.process_time() - before
            table.append([seconds[name] / seconds["PyTorch"] for name in ways])
    ratios = dict(zip(ways, np.median(table, axis=0), strict=True))
    parity = {path.name: compare([clip], tower, path) for path in (plain, low)}
    exact, near = parity[plain.name], parity[low.name]
    print(
        f"  {tower}: float32 graph {ratios['ONNX']:.2f} times PyTorch's time, int8 {ratios['int8']:.2f}, PyTorch with "
        f"every token of the last block {ratios['every token']:.2f}"
    )
    print(
        f"  {tower}: int8 takes {low.stat().st_size / plain.stat().st_size:.2f} of the bytes; differ by "
        f"{exact.max_abs:.1e} and {near.max_abs:.1e}, least cosine {near.min_cosine:.4f}"
    )


if __name__ == "__main__":
    main()
