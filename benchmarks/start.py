"""How long the commands take before they compute: processor seconds of whole commands against their imports alone.

A small bundle (a seed and two experts of the demo's smallest model, untrained, routed with all-MiniLM) is made in a
temporary folder, so that what is measured is the start and hardly any work. Every line is a process of its own, run
several times after one run that warms the caches of files; the median of user and system time is printed. The imports
of torch, and of torch with open_clip, are the yardsticks: `route` needs the first and `classify` both.

    python benchmarks/start.py --rounds 5
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from modeclip.mixture.bundle import save_bundle
from modeclip.models.clip import load_clip, save_clip
from modeclip.models.encoders import load_encoder

MODEL = "modeclip-icon-xxs"
NAMES = ["arrow", "heart", "star", "user"]
UNTIL_IT_COMPUTES = """
import os, sys
from modeclip.commands import main
from modeclip.models.encoders.bert import SentenceBert

SentenceBert.forward = lambda *_: os._exit(0)
main(sys.argv[1:])
sys.exit("nothing was computed")
"""
"""A command that ends at its first forward pass, that of the sentence encoder on the class names."""


def machine() -> str:
    """Return the name of the processor, and how many PyTorch uses."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {torch.get_num_threads()} cores, torch {torch.__version__}"


def make_bundle(folder: Path) -> Path:
    """Write a bundle of a seed and two experts, each with two fine clusters."""
    models = {name: folder / "models" / name for name in ("seed", "expert-0", "expert-1")}
    for seed, model in enumerate(models.values()):
        save_clip(load_clip(MODEL, seed=seed), model)
    cards = {
        "fine": [
            {"index": s, "size": 50, "keywords": [name], "nearest_captions": [name]} for s, name in enumerate(NAMES)
        ],
        "experts": [{"index": k, "size": 100, "keywords": [NAMES[2 * k]]} for k in range(2)],
    }
    save_bundle(
        folder / "bundle",
        models=models,
        fine_centers=load_encoder("minilm").encode(NAMES),
        expert_of_fine=np.array([0, 0, 1, 1]),
        cards=cards,
        manifest={
            "name": "start",
            "encoder": "minilm",
            "rule": "per_class",
            "temperature": 0.1,
            "templates": ["{}"],
            "lineage": {},
        },
    )
    return folder / "bundle"


def processor_seconds(command: list[str]) -> float:
    """Return user and system seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="Runs of each command, of which the median counts.")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        bundle, picture = make_bundle(Path(name)), Path(name) / "picture.png"
        Image.new("RGB", (64, 64), "red").save(picture)
        modeclip = ["-m", "modeclip"]
        classify = ["classify", str(bundle), str(picture), "--classes", "cat,dog"]
        commands = {
            "import torch": ["-c", "import torch"],
            "import torch, open_clip": ["-c", "import torch, open_clip"],
            "modeclip --help": [*modeclip, "--help"],
            "modeclip route --help": [*modeclip, "route", "--help"],
            "modeclip route": [*modeclip, "route", str(bundle), "--classes", "cat,dog"],
            "classify, until it computes": ["-c", UNTIL_IT_COMPUTES, *classify],
            "modeclip classify": [*modeclip, *classify],
        }
        print(f"{datetime.now(UTC).date()}, {machine()}; processor seconds, median of {rounds} (least, most)")
        for label, command in commands.items():
            processor_seconds(command)
            seconds = [processor_seconds(command) for _ in range(rounds)]
            print(f"{label:28} {median(seconds):6.2f} ({min(seconds):.2f}, {max(seconds):.2f})", flush=True)


if __name__ == "__main__":
    main()
