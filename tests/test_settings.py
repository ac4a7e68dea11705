"""Settings that cannot be meant: one line with the range, in every command, before anything is opened or written."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]
TRAIN = ("train", "NOWHERE")
EXPERTS = ("train-experts", "NOWHERE")
FINETUNE = ("finetune", "NOWHERE", "NOWHERE", "--out", "NOWHERE")
TABLE = [
    (TRAIN, "--seed", "-3", r"--seed: expected 0 or more, got -3"),
    (TRAIN, "--seed", str(2**63), r"--seed: expected 0 or more \(and below 2\^63\), got 9223372036854775808"),
    (TRAIN, "--learning-rate", "0", r"--learning-rate: expected a finite number above 0, got 0"),
    (TRAIN, "--learning-rate", "nan", r"--learning-rate: expected a finite number above 0, got nan"),
    (TRAIN, "--learning-rate", "inf", r"--learning-rate: expected a finite number above 0, got inf"),
    (
        TRAIN,
        "--learning-rate",
        "5",
        r"--weight-decay: expected below 1 / --learning-rate, here 0\.2.*got 0\.2",
    ),
    (TRAIN, "--weight-decay", "-0.1", r"--weight-decay: expected 0 or more, got -0\.1"),
    (TRAIN, "--weight-decay", "inf", r"--weight-decay: expected 0 or more.*, got inf"),
    (TRAIN, "--warmup-fraction", "1", r"--warmup-fraction must lie in \[0, 1\), got 1"),
    (TRAIN, "--warmup-fraction", "nan", r"--warmup-fraction must lie in \[0, 1\), got nan"),
    (TRAIN, "--clip-grad-norm", "nan", r"--clip-grad-norm: expected 0 or more, got nan"),
    (TRAIN, "--samples", "0", r"--samples: expected 1 or more, got 0"),
    (TRAIN, "--samples", str(10**30), r"--samples: expected 1 or more \(and below 2\^63\), got 10{30}"),
    (TRAIN, "--batch-size", "1", r"--batch-size must be at least 2.*got 1"),
    (TRAIN, "--save-every", "0s", r"--save-every must be above 0, got \'0s\'"),
    (TRAIN, "--save-every", "-1s", r"--save-every must be auto, or a number with s, min.*got \'-1s\'"),
    (TRAIN, "--workers", "-1", r"--workers: expected 0 to 4,096, got -1"),
    (TRAIN, "--workers", "1000000", r"--workers: expected 0 to 4,096, got 1000000"),
    (TRAIN, "--micro-batch", "-1", r"--micro-batch must be auto or at least 0, got -1"),
    (TRAIN, "--keep-pictures-gb", "inf", r"--keep-pictures-gb: expected 0 or more.*got inf"),
    (TRAIN, "--min-crop-share", "nan", r"--min-crop-share must lie in \(0, 1\], got nan"),
    (EXPERTS, "--seed", "-1", r"--seed: expected 0 or more, got -1"),
    (EXPERTS, "--jobs", "0", r"--jobs: expected 1 to 4,096, got 0"),
    (EXPERTS, "--threads-per-job", "1000000", r"--threads-per-job: expected 1 to 4,096, got 1000000"),
    (EXPERTS, "--only", "-1", r"--only: expected numbers of experts, 0 or more, got -1"),
    (EXPERTS, "--out-of-cluster-fraction", "nan", r"--out-of-cluster-fraction must lie in \[0, 1\], got nan"),
    (EXPERTS, "--temperature", "0", r"--temperature: expected a finite number above 0, got 0"),
    (FINETUNE, "--learning-rate", "0", r"--learning-rate: expected a finite number above 0, got 0"),
    (FINETUNE, "--weight-decay", "-1", r"--weight-decay must be 0 or more and finite, got -1"),
    (FINETUNE, "--warmup-fraction", "1", r"--warmup-fraction must lie in \[0, 1\), got 1"),
    (FINETUNE, "--seed", "-3", r"--seed: expected 0 or more, got -3"),
    (FINETUNE, "--threads", "-1", r"--threads: expected 0 to 4,096, got -1"),
    (FINETUNE, "--epochs", "0", r"--epochs: expected 1 or more, got 0"),
    (
        ("extend", "NOWHERE", "NOWHERE", "--out", "NOWHERE"),
        "--learning-rate",
        "nan",
        r"--learning-rate: .*above 0, got nan",
    ),
    (("extend", "NOWHERE", "NOWHERE", "--out", "NOWHERE"), "--seed", "-1", r"--seed: expected 0 or more, got -1"),
    (("extend", "NOWHERE", "NOWHERE", "--out", "NOWHERE"), "--samples", "0", r"--samples: expected 1 or more, got 0"),
    (("merge", "NOWHERE", "NOWHERE", "--out", "NOWHERE"), "--weights", "nan", r"--weights must be at least 0.*got nan"),
    (("embed", "NOWHERE"), "--dimension", "0", r"--dimension: expected 1 to 65,536, got 0"),
    (("embed", "NOWHERE"), "--dimension", "1000000", r"--dimension: expected 1 to 65,536, got 1000000"),
    (("embed", "NOWHERE"), "--batch-size", "0", r"--batch-size: expected 1 or more, got 0"),
    (("cluster", "NOWHERE"), "--seed", "-3", r"--seed: expected 0 or more, got -3"),
    (("cluster", "NOWHERE"), "--max-size-ratio", "inf", r"--max-size-ratio: expected 1 or more.*got inf"),
    (("cluster", "NOWHERE"), "--fit-samples", "0", r"--fit-samples: expected 1 or more, got 0"),
    (("cluster", "NOWHERE"), "--threshold", "nan", r"--threshold: expected a cosine in \(0, 1\], got nan"),
    (("check", "NOWHERE"), "--seed", "-1", r"--seed: expected 0 or more, got -1"),
    (("check", "NOWHERE"), "--threads", "0", r"--threads: expected 1 to 4,096, got 0"),
    (
        ("index", "NOWHERE"),
        "--holdout-fraction",
        "nan",
        r"--holdout-fraction: expected a number in \[0, 1\), got nan",
    ),
    (("index", "NOWHERE"), "--image-size", "100000", r"--image-size: expected 1 to 4,096, got 100000"),
    (("index", "NOWHERE"), "--holdout-seed", "-1", r"--holdout-seed: expected 0 or more.*got -1"),
    (("evaluate", "NOWHERE", "--tasks", "NOWHERE"), "--batch-size", "0", r"--batch-size: expected 1 or more, got 0"),
    (
        ("evaluate", "NOWHERE", "--tasks", "NOWHERE"),
        "--probe-c",
        "inf",
        r"--probe-c: expected a finite number above 0, got inf",
    ),
]


@pytest.mark.parametrize(
    ("command", "option", "value", "message"), TABLE, ids=[f"{t[0][0]} {t[1]} {t[2]}" for t in TABLE]
)
def test_a_setting_out_of_range_is_one_line(
    modeclip_command: Command, tmp_path: Path, command: tuple[str, ...], option: str, value: str, message: str
) -> None:
    words = [str(tmp_path / word) if word == "NOWHERE" else word for word in command]
    done = modeclip_command(
        *words, f"{option}={value}" if value.startswith("-") else option, *([] if value.startswith("-") else [value])
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.search(f"^modeclip: error: .*{message}", done.stderr), done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("train: {seed: -3}", r"train\.seed: expected 0 or more, got -3"),
        ("train: {learning_rate: .nan}", r"train\.learning_rate: expected a finite number above 0, got nan"),
        ("train: {engine: {workers: -1}}", r"train\.engine\.workers: expected 0 to 4,096, got -1"),
        ("evaluate: {temperature: -1}", r"evaluate\.temperature: expected a finite number above 0, got -1"),
        ("cluster: {max_expert_ratio: .inf}", r"cluster\.max_expert_ratio: expected 1 or more.*got inf"),
        ("experts: {jobs: 0}", r"experts\.jobs: expected 1 to 4,096, got 0"),
    ],
)
def test_a_recipe_too(modeclip_command: Command, tmp_path: Path, section: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(f"data: {{source: icons}}\n{section}\n")
    done = modeclip_command("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(f"^modeclip: error: .*{message}", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["[" * 5000, "{a: " * 3000, "9" * 6000, "2020-99-99", "\t[a"])
def test_a_recipe_that_yaml_cannot_hold_is_one_line(modeclip_command: Command, tmp_path: Path, value: str) -> None:
    (tmp_path / "r.yaml").write_text(f"data: {{source: icons}}\nname: {value}\n")
    done = modeclip_command("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.fullmatch(r"modeclip: error: recipe .*no valid YAML .*; correct that line\n", done.stderr), done.stderr
