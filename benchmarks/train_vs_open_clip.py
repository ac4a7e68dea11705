"""Training speed and loss curve compared with those of the installed release of open_clip_train.

    python benchmarks/train_vs_open_clip.py                        ViT-B-32 and the demo's model, two rounds
    python benchmarks/train_vs_open_clip.py --models modeclip-icon --steps 40 --rounds 5

Both train the same model from random weights on the same pairs of real icons, with the same batch size, precision,
threads, augmentation and two loader processes: open_clip_train from a CSV of image files, modeclip from a catalog that
refers to the same files. (Its reader of tar shards fails with webdataset 1.0, which read_expert.py measures.) Each runs
in a process of its own, as its users run it, in turn. A rate is the batch size over the median time of the steps after
the first few.

The curves: open_clip_train's own `train_one_epoch` and modeclip's engine take 20 steps from the same weights on the
same batches at the same learning rates in float32; the largest difference of their losses is printed.

On a GPU the same script trains in bfloat16 there and states the share of the peak that the towers' products reach.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from modeclip.system.devices import choose_precision
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob

BARS = {"ViT-B-32": 1.3, "modeclip-icon": 1.2}
BATCHES = {"ViT-B-32": 64, "modeclip-icon": 256}
STEPS = {"ViT-B-32": 10, "modeclip-icon": 60}
CURVE_BATCHES = {"ViT-B-32": 16, "modeclip-icon": 256}
CURVE_STEPS = 20
WARM_UP_STEPS = 3
WORKERS = 2
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 products a second, as the vendor states them."""
PEER = """
import sys
import open_clip
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""
PEER_PRECISION = {"bf16-mixed": "amp_bf16", "16-mixed": "amp", "32-true": "fp32"}
OWN_CONFIGS = Path(sys.modules["modeclip"].__file__ or "").parent / "models"


def write_pairs(folder: Path, num_pairs: int) -> Path:
    """Write real icons at 64 pixels, repeated until there are enough, as files with a table; return the table."""
    from modeclip.data.samples import Sample
    from modeclip.data.sources.icons import read_icons

    found = (item for item in read_icons(["tabler", "phosphor"], 64) if isinstance(item, Sample))
    lines = ["filepath\ttitle"]
    for number, icon in zip(range(num_pairs), cycle(list(islice(found, 4000))), strict=False):
        path = folder / f"{number:06d}.png"
        path.write_bytes(icon.image or b"")
        lines.append(f"{path}\t{icon.caption}")
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def make_job(folder: Path, catalog: Path, model: str, steps: int, threads: int, batch_size: int) -> TrainJob:
    """Return a job of some steps that logs each of them."""
    config = TrainConfig(
        model=model,
        samples=batch_size * max(steps, 2),
        batch_size=batch_size,
        total_parts=2,
        seed_parts=1,
        learning_rate=5e-4,
        engine=EngineConfig(workers=WORKERS, log_every=1, save_every="10h"),
    )
    return TrainJob(
        name="benchmark",
        folder=str(folder),
        catalog=str(catalog),
        catalog_fingerprint="",
        config=config,
        first_step=0,
        last_step=steps,
        first_share=0.0,
        last_share=1.0,
        threads=threads,
    )


def time_modeclip(job: TrainJob) -> list[float]:
    """Return the seconds of each step after the first few."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "modeclip.training.trainer", str(job.save())]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    lines = [json.loads(line) for line in (Path(job.folder) / "log.jsonl").read_text().splitlines()]
    waits = sum(line["data_wait"] for line in lines[WARM_UP_STEPS:]) / len(lines[WARM_UP_STEPS:])
    print(f"    modeclip: data wait {100 * waits:.1f} % of the time", file=sys.stderr)
    return [job.config.batch_size / line["samples_per_second"] for line in lines[WARM_UP_STEPS:]]


def time_open_clip(folder: Path, table: Path, job: TrainJob) -> list[float]:
    """Return the seconds of each step after the first few."""
    config = job.config
    options = {
        "train-data": table,
        "dataset-type": "csv",
        "model": config.model,
        "batch-size": config.batch_size,
        "precision": PEER_PRECISION[choose_precision(config.engine.precision)],
        "workers": WORKERS,
        "epochs": 1,
        "lr": config.learning_rate,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "wd": config.weight_decay,
        "warmup": 2,
        "log-every-n-steps": 1,
        "save-frequency": 0,
        "logs": folder,
        "name": "peer",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    done = subprocess.run(
        [sys.executable, "-c", PEER, str(OWN_CONFIGS), *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rates = re.findall(r"Batch \(t\): [\d.]+, ([\d.e+]+)/s", done.stdout + done.stderr)
    return [config.batch_size / float(rate) for rate in rates[WARM_UP_STEPS:]]


def curve_difference(folder: Path, catalog_path: Path, model: str) -> tuple[list[float], list[float]]:
    """Return the losses of 20 steps of open_clip_train and of modeclip with the same weights, batches and rates."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    from modeclip.data.catalog import Catalog
    from modeclip.models.clip import load_clip
    from modeclip.training import trainer as training
    from modeclip.training.batches import Feed, job_rows

    size = CURVE_BATCHES[model]
    job = make_job(folder / "curve", catalog_path, model, CURVE_STEPS, 2, size)
    engine = EngineConfig(precision="32-true", log_every=1, save_every="10h")
    job = TrainJob(**{**vars(job), "config": TrainConfig(**{**vars(job.config), "engine": engine})})
    training.train(job)
    lines = [json.loads(line) for line in (Path(job.folder) / "log.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines]

    clip = load_clip(model, seed=job.config.seed)
    rows = job_rows(job, Catalog.open(catalog_path))
    feed = Feed(
        catalog=job.catalog,
        rows=torch.from_numpy(rows),
        config=job.config,
        tokenizer=clip.tokenizer,
        preprocess=clip.preprocess,
        image_size=clip.image_size,
    )
    mean, std = (torch.tensor(getattr(clip.model.visual, f"image_{name}")).view(1, 3, 1, 1) for name in ("mean", "std"))
    batches = [
        ((batch.images.float() / 255 - mean) / std, batch.tokens) for batch, _ in feed.batches(range(CURVE_STEPS))
    ]

    class Loader(list):  # type: ignore[type-arg]
        num_batches, num_samples = CURVE_STEPS, CURVE_STEPS * size

    plain = [value for value in clip.model.parameters() if value.ndim < 2]
    matrices = [value for value in clip.model.parameters() if value.ndim >= 2]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": matrices, "weight_decay": job.config.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=job.config.learning_rate, betas=(0.9, 0.98), eps=1e-6)

    def schedule(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate(step)

    theirs: list[float] = []

    class Writer:
        def add_scalar(self, name: str, value: float, _: int) -> None:
            if name == "train/loss":
                theirs.append(value)

    settings: dict[str, Any] = {
        "device": "cpu",
        "precision": "fp32",
        "distill": False,
        "accum_freq": 1,
        "skip_scheduler": False,
        "horovod": False,
        "grad_clip_norm": None,
        "log_every_n_steps": 1,
        "batch_size": size,
        "world_size": 1,
        "rank": 0,
        "local_rank": 0,
        "log_local": False,
        "wandb": False,
    }
    clip.model.output_dict = True
    data = {"train": SimpleNamespace(dataloader=Loader(batches), set_epoch=lambda _: None)}
    args = SimpleNamespace(**settings)
    train_one_epoch(clip.model, data, ClipLoss(), 0, optimizer, None, schedule, None, args, tb_writer=Writer())
    return theirs, ours


def utilisation(model: str, captions: list[str], seconds: float, batch_size: int) -> str:
    """Return the share of the GPU's peak that the products of the towers reach; captions are cut as in training."""
    from torch.utils.flop_counter import FlopCounterMode

    from modeclip.models.clip import encode_image, encode_text, load_clip

    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    if peak is None:
        return f"no peak known for {name}"
    clip = load_clip(model)
    width, height = clip.image_size
    with FlopCounterMode(display=False) as counter:
        encode_image(clip.model, torch.zeros(1, 3, height, width))
    image = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        encode_text(clip.model, clip.tokens(captions[:batch_size]))
    text = counter.get_total_flops() / len(captions[:batch_size])
    return f"{100 * 3 * (image + text) * batch_size / seconds / peak:.1f} % of {peak / 1e12:.0f} TFLOP/s (bf16)"


def main() -> None:
    """Run both trainers in turn for each model and print medians, their ratio and the curves' difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(BARS), choices=list(BARS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-curves", action="store_true")
    arguments = parser.parse_args()
    from modeclip.data.catalog import Catalog
    from modeclip.data.indexing import index
    from modeclip.data.sources import DataConfig

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    print(
        f"{datetime.now(UTC).date()}, {platform.processor() or platform.machine()}, {device}, torch {torch.__version__}"
    )
    print(f"precision {choose_precision('auto')}, {arguments.threads} threads, {WORKERS} loader processes each")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for model in arguments.models:
            batch_size, steps = arguments.batch_size or BATCHES[model], arguments.steps or STEPS[model]
            (folder / model).mkdir()
            table = write_pairs(folder / model, batch_size * steps)
            index(DataConfig.from_flat({"source": str(table), "image_column": "filepath"}), folder / model / "catalog")
            catalog = folder / model / "catalog" / "catalog.lance"
            ours, theirs = [], []
            for turn in range(arguments.rounds):
                own = folder / f"{model}-{turn}"
                job = make_job(own, catalog, model, steps, arguments.threads, batch_size)
                ours.append(statistics.median(time_modeclip(job)))
                theirs.append(statistics.median(time_open_clip(folder / f"{model}-peer-{turn}", table, job)))
            mine, peer = statistics.median(ours), statistics.median(theirs)
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            print(
                f"{model}, batch {batch_size}: modeclip {batch_size / mine:,.1f} samples/s, open_clip_train "
                f"{batch_size / peer:,.1f}; ratio {peer / mine:.2f} ({min(ratios):.2f} to {max(ratios):.2f} in "
                f"{arguments.rounds} rounds; bar {BARS[model]})"
            )
            if torch.cuda.is_available():
                captions = Catalog.open(catalog).read(["caption"])["caption"].tolist()
                print(f"{model}: {utilisation(model, captions, mine, batch_size)}")
            if not arguments.no_curves:
                first, second = curve_difference(folder / f"{model}-curve", catalog, model)
                difference = max(abs(a - b) for a, b in zip(first, second, strict=True))
                print(f"{model}: losses of {CURVE_STEPS} steps differ by at most {difference:.1e} (bar 1e-3)")


if __name__ == "__main__":
    main()
