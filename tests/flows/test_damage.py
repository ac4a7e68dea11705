"""Every kind of file of a finished run is damaged, then the same command is given again: what is broken is made again,
with the same bytes, and said; or it is one line. No damage is left in place, and none is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("trains_here")

TIMED = ("stages/", "results", "report.html", "done.json", "job.json")
"""Files that say when, how fast or where they were made: they come again, but not with the same bytes in a copy."""


def change(path: Path, damage: str) -> None:
    """Damage a file, leaving alone the other names that its bytes may have."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "folder":
        path.mkdir()
    elif damage != "removed":
        path.write_text(damage)


def first(run: Path, pattern: str) -> Path:
    return next(path for path in sorted(run.glob(pattern)) if path.is_file())


DAMAGES = [
    ("stages/embed.json", "flip"),
    ("stages/train.json", "[]"),
    ("stages/evaluate.json", "{}"),
    ("catalog.lance/data/*.lance", "flip"),
    ("catalog.lance/_versions/*.manifest", "cut"),
    ("tasks.lance/data/*.lance", "cut"),
    ("clusters/clustering.safetensors", "flip"),
    ("clusters/cards.json", "null"),
    ("models/expert-0/done.json", '"x"'),
    ("models/expert-0/job.json", "removed"),
    ("models/expert-0/open_clip_model.safetensors", "flip"),
    ("models/dense/checkpoints/*", "flip"),
    ("bundle/mode.json", "cut"),
    ("bundle/expert-1/open_clip_model.safetensors", "folder"),
    ("bundle/clusters.json", "flip"),
    ("features/images-*", "flip"),
    ("results.json", "[]"),
    ("results/*.json", "flip"),
    ("results/predictions/*.parquet", "cut"),
    ("report.html", "removed"),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGES)
def test_the_same_run_again_makes_what_was_damaged(
    pattern: str,
    damage: str,
    small_run: Path,
    small_recipe: Path,
    tmp_path: Path,
    modeclip_command: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    broken = first(run, pattern)
    before = broken.read_bytes()
    change(broken, damage)
    done = modeclip_command("run", small_recipe, "--out", run)
    said = done.stderr + capfd.readouterr().err
    assert done.returncode == 0, said
    assert damage == "removed" or broken.name in said
    if broken.suffix == ".lance":
        pass  # the new version has files of new names; `check --deep` looks at them below
    elif any(part in str(broken.relative_to(run)) for part in TIMED):
        assert broken.stat().st_size > 0
    else:
        assert broken.read_bytes() == before
    weights = "models/expert-0/open_clip_model.safetensors"
    assert (run / weights).read_bytes() == (small_run / weights).read_bytes()
    checked = modeclip_command("check", run, "--deep", "--json")
    assert checked.returncode == 0, checked.stdout
    again = modeclip_command("run", small_recipe, "--out", run)
    assert again.returncode == 0
    assert "damaged" not in again.stderr


def test_check_deep_names_each_damaged_file(
    small_run: Path, tmp_path: Path, modeclip_command: Callable[..., Any]
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    patterns = [
        "stages/index.json",
        "models/seed/open_clip_*.safetensors",
        "catalog.lance/data/*",
        "bundle/clusters.json",
    ]
    broken = [first(run, pattern) for pattern in patterns]
    for path in broken:
        change(path, "flip")
    done = modeclip_command("check", run, "--deep", "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert {one["file"] for one in found["files"] if one["state"] == "damaged"} == {str(path) for path in broken}
    assert all("modeclip run" in one["advice"] for one in found["files"] if one["state"] == "damaged")
