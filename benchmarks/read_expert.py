"""Speed of reading one expert's pairs from tar shards: row by row through a catalog, or with webdataset and a filter.

    python benchmarks/read_expert.py                      40,000 pairs in 4 shards, 4 experts, 0 and 2 workers
    python benchmarks/read_expert.py --pairs 100000 --rounds 5 --image-size 64

Both read the same shards in random order through a torch DataLoader with the same number of workers, decode the
pictures, and return batches of 256 as one tensor with the captions. webdataset shuffles its shards and 1,000 samples,
and drops the samples of other experts before it decodes a picture. The catalog refers to the shards and reads the rows
of the expert alone. Epochs alternate. The first one, in which the workers start, is printed apart; rates are medians
over the others.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

BAR = 3.0
BATCH = 256
EXPERT = 1
NUM_EXPERTS = 4
NUM_RENDERED = 4000
PAIRS_PER_SHARD = 10_000


def write_shards(folder: Path, num_pairs: int, image_size: int) -> list[str]:
    """Write real icons, repeated until there are enough, as shards of key.png, key.txt and key.json."""
    from modeclip.data.samples import Sample
    from modeclip.data.sources.icons import read_icons

    found = (item for item in read_icons(["tabler", "phosphor"], image_size) if isinstance(item, Sample))
    icons = cycle(list(islice(found, NUM_RENDERED)))
    draw, paths = np.random.default_rng(0), []
    for start in range(0, num_pairs, PAIRS_PER_SHARD):
        paths.append(str(folder / f"{start // PAIRS_PER_SHARD:05d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(start, min(num_pairs, start + PAIRS_PER_SHARD)):
                icon, key = next(icons), f"{number:09d}"
                about = json.dumps({"key": key, "expert": int(draw.integers(NUM_EXPERTS))})
                for suffix, data in (("png", icon.image), ("txt", icon.caption.encode()), ("json", about.encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def write_catalog(folder: Path, shards: Sequence[str]) -> str:
    """Index the shards where they lie and add the column of experts."""
    from modeclip import Catalog
    from modeclip.data.indexing import index
    from modeclip.data.sources.options import DataConfig

    index(DataConfig(source="::".join(shards)), folder)
    catalog = Catalog.open(folder / "catalog.lance")
    expert_of_key: dict[str, int] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    about = json.loads(tar.extractfile(member).read())
                    expert_of_key[about["key"]] = about["expert"]
    keys = catalog.read(["key"])["key"]
    catalog.add_columns({"expert": np.array([expert_of_key[key.rpartition("/")[2]] for key in keys], np.int32)})
    return str(folder / "catalog.lance")


def collate(pairs: tuple[Sequence[Image.Image], Sequence[str]]) -> tuple[torch.Tensor, list[str]]:
    """Return pictures as one (B, H, W, 3) tensor, with their captions."""
    images, captions = pairs
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])), list(captions)


def collate_samples(samples: Sequence[tuple[Image.Image, str]]) -> tuple[torch.Tensor, list[str]]:
    """Return the batch of a list of pairs, as ``collate`` does."""
    return collate(tuple(zip(*samples, strict=True)))


class Rows(Dataset[Any]):
    """Rows of a catalog, read a batch at a time."""

    def __init__(self, path: str, rows: np.ndarray) -> None:
        self.path, self.rows = path, rows
        self._catalog: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_catalog": None}  # each worker opens its own

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[list[Image.Image], list[str]]:
        from modeclip import Catalog

        self._catalog = self._catalog or Catalog.open(self.path)
        rows = self.rows[np.asarray(numbers)]
        return self._catalog.images(rows), self._catalog.read(["caption"], rows)["caption"].tolist()


def loader_options(workers: int) -> dict[str, Any]:
    """Return the settings that both loaders share; Lance must not be forked."""
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers}
    return options | ({"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {})


def load_catalog(path: str, workers: int) -> DataLoader[Any]:
    """Return a loader of the expert's rows."""
    from modeclip import Catalog

    rows = Catalog.open(path).select(expert=EXPERT)
    return DataLoader(Rows(path, rows), shuffle=True, collate_fn=collate, **loader_options(workers))


def is_expert(sample: dict[str, Any]) -> bool:
    """Return whether an undecoded sample of a shard belongs to the expert."""
    return bool(json.loads(sample["json"])["expert"] == EXPERT)


def load_webdataset(shards: Sequence[str], workers: int) -> DataLoader[Any]:
    """Return a loader that streams all shards and keeps the expert's pairs."""
    import webdataset as wds

    stream = wds.WebDataset(list(shards), shardshuffle=len(shards), seed=0, empty_check=False)
    stream = stream.shuffle(1000).select(is_expert).decode("pil").to_tuple("png", "txt")
    return DataLoader(stream, collate_fn=collate_samples, **loader_options(workers))


def run_epoch(batches: Iterator[Any]) -> tuple[int, float]:
    """Return pairs and seconds of one epoch."""
    started, count = time.perf_counter(), 0
    for images, captions in batches:
        assert len(images) == len(captions)
        count += len(captions)
    return count, time.perf_counter() - started


def compare(loaders: dict[str, DataLoader[Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Run epochs in turn; return the pairs per second of each loader, in later epochs and in the first."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    counts: dict[str, set[int]] = {name: set() for name in loaders}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            count, seconds = run_epoch(iter(loader))
            counts[name].add(count)
            rates[name].append(count / seconds)
    assert counts["webdataset"] == counts["modeclip"], counts
    return {name: {"rate": float(np.median(r[1:])), "first_epoch_rate": r[0]} for name, r in rates.items()}


def profile(path: str) -> None:
    """Print the functions that the catalog spends its time in, in this process."""
    import cProfile
    import pstats

    run_epoch(iter(load_catalog(path, 0)))
    profiler = cProfile.Profile()
    profiler.runcall(run_epoch, iter(load_catalog(path, 0)))
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def main() -> None:
    """Make the data, compare, and print a line for each number of workers and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each that count")
    parser.add_argument("--profile", action="store_true", help="say where the catalog's time goes and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), arguments.pairs, arguments.image_size)
        path = write_catalog(Path(folder) / "out", shards)
        if arguments.profile:
            profile(path)
            return
        make: dict[str, Callable[[int], DataLoader[Any]]] = {
            "webdataset": partial(load_webdataset, shards),
            "modeclip": partial(load_catalog, path),
        }
        for workers in arguments.workers:
            rates = compare({name: load(workers) for name, load in make.items()}, arguments.rounds)
            results[workers] = {**rates, "ratio": rates["modeclip"]["rate"] / rates["webdataset"]["rate"]}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{datetime.now(UTC).date()}, {processor()}, {cores} core(s), {arguments.pairs:,} pairs of"
        f" {arguments.image_size} px, {NUM_EXPERTS} experts, torch {torch.__version__}"
    )
    for workers, result in results.items():
        for name in make:
            rate, first = result[name]["rate"], result[name]["first_epoch_rate"]
            print(f"{workers} workers  {name:<11} {rate:8,.0f} pairs/s   first epoch with start {first:8,.0f}")
        print(f"{workers} workers  ratio       {result['ratio']:8.2f}")
    ratio = min(result["ratio"] for result in results.values())
    print(
        json.dumps(
            {"benchmark": "read_expert", "ratio": round(ratio, 3), "bar": BAR, "met": ratio >= BAR, "workers": results}
        )
    )


if __name__ == "__main__":
    main()
