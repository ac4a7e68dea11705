"""A pilot through the real command: stopped several times it trains nothing twice, and its numbers stay the same."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modeclip.data.catalog import Catalog
from modeclip.evaluation.frontier import SAMPLES_PER_FLOP
from modeclip.mixture.bundle import load_bundle
from modeclip.models.flops import count_flops
from modeclip.pipeline import pilot as piloting
from modeclip.training import trainer
from support import encode_picture, noise_picture, parse_page, weights_of, write_pairs

Command = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("--samples", 192, "--seeds", 1, "--model", "modeclip-icon-xxxs", "--batch-size", 8, "--experts", 2)
HELD = ("--holdout-fraction", 0.3, "--holdout", "image")
WAYS = ["dense", "captions", "images", "trunk", "names", "curated"]


class StoppedError(Exception):
    """What a kill is to the tests: nothing behind it is done."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """220 pictures of two kinds, each with a caption of its own."""
    kinds = [("cat", "dog")[number % 2] for number in range(220)]
    images = []
    for number, kind in enumerate(kinds):
        pixels = np.asarray(noise_picture(number, (16, 16))).astype(int)
        tint = np.array([90, 0, -90] if kind == "cat" else [-90, 0, 90])
        images.append(encode_picture(Image.fromarray(np.clip(pixels + tint, 0, 255).astype(np.uint8))))
    captions = [f"{kind} number {number}" for number, kind in enumerate(kinds)]
    return write_pairs(tmp_path_factory.mktemp("pilot") / "pairs", images, captions)


def stop_at(patch: pytest.MonkeyPatch, home: Any, name: str, call: int) -> None:
    """Stop right after a function has been called so often, before whoever called it can note that."""
    original, calls = getattr(home, name), Counter[str]()

    def stopping(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        calls[name] += 1
        if calls[name] == call:
            raise StoppedError
        return result

    patch.setattr(home, name, stopping)


@pytest.mark.usefixtures("trains_here")
def test_a_pilot_that_is_stopped_goes_on_to_the_same_numbers(
    pairs: Path, tmp_path: Path, modeclip_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "out", Counter[str]()
    words = ("pilot", pairs, "--classes", "cat,dog", *SMALL, *HELD, "--out", out, "--json")
    original = trainer.train

    def counting(job: Any, *args: Any, **options: Any) -> Any:
        result = original(job, *args, **options)
        begun[str(Path(job.folder).relative_to(out))] += 1
        return result

    monkeypatch.setattr(trainer, "train", counting)
    for home, name, call in (
        (piloting, "cluster", 2),
        (trainer, "train", 4),
        (piloting, "evaluate", 1),
    ):
        with monkeypatch.context() as patch:
            stop_at(patch, home, name, call)
            with pytest.raises(StoppedError):
                modeclip_command(*words)
        assert not (out / "pilot.json").exists()
    done = modeclip_command(*words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    assert len(begun) == 1 + 3 + 3 * 2
    assert set(begun.values()) == {1}  # nothing was trained twice
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == WAYS
    assert all(0.7 < row["cost"] <= 1 for row in rows.values()), {name: row["cost"] for name, row in rows.items()}
    assert rows["dense"]["cost"] == 1
    assert (rows["captions"]["towers"], rows["images"]["towers"], rows["names"]["towers"]) == (2, 3, 1)
    assert rows["images"]["megabytes"] > 2.5 * rows["dense"]["megabytes"]
    assert result["measure"] == "class names"
    assert result["verdict"]["certainty"] in {"likely", "open"}  # one seed is never sure
    for row in result["rows"]:
        hits = np.mean([row["recall"][f"{side}_retrieval_recall@{k}"] for side in ("image", "text") for k in (1, 5)])
        assert row["score"]["retrieval"] == pytest.approx(hits)
    kept = Catalog.open(out / "seed-0" / "curated" / "catalog.lance")
    assert rows["curated"]["pairs"] == kept.read(["dfn_kept"])["dfn_kept"].sum()
    assert rows["captions"]["pairs"] == rows["dense"]["pairs"] == len(kept) == result["sample"]["pairs"]
    assert load_bundle(rows["images"]["models"][0]).encoder == f"clip-image:{out.resolve()}/seed-0/seed"

    page = parse_page(out / "pilot.html")
    assert result["verdict"]["sentence"] in page.text
    flops, samples = count_flops(result["plan"]["model"], result["plan"]["caption_length"]), result["plan"]["samples"]
    assert f"{SAMPLES_PER_FLOP * flops.training / samples:.2g} times shorter" in result["outlook"]
    assert result["outlook"] in page.text
    assert all(row["title"] in page.text for row in result["rows"])

    # what is left of a pilot that was stopped later still: all is asked again, and the answers are the same
    weights, before = weights_of(out / "seed-0" / "dense"), (out / "pilot.json").read_bytes()
    for path in (out / "pilot.json", out / "seed-0" / "measured.json", out / "pilot.html"):
        path.unlink()
    again = json.loads(modeclip_command(*words).stdout)
    assert again == result
    assert (out / "pilot.json").read_bytes() == before
    assert weights_of(out / "seed-0" / "dense") == weights
    assert set(begun.values()) == {1}
    table = modeclip_command(*words[:-1])
    assert result["verdict"]["sentence"] in " ".join(table.stdout.split())

    other = modeclip_command(*words, "--keep-fraction", 0.5)
    assert other.returncode == 2
    assert "keep_fraction was 0.3, now 0.5" in other.stderr or "--keep-fraction was 0.3, now 0.5" in other.stderr
    assert "another --out" in other.stderr


def test_what_cannot_be_tried_is_refused_in_a_line(pairs: Path, tmp_path: Path, modeclip_command: Command) -> None:
    for words, cause in (
        (("--pairs", 60), "expected at least 48 pairs.*50 held-out"),
        (("--classes", "zebra,lion"), "expected at least 50 held-out captions.*got 0.*write the names"),
        (("--classes", "Cat,cat"), "at least 2 different class names, got 1"),
        (("--minutes", 0), "minutes.*above 0"),
        (("--experts", 1), "experts.*2 or more"),
        (("--tasks", "lucide"), "holds out pairs by itself"),
    ):
        done = modeclip_command("pilot", pairs, *SMALL, *HELD, *words, "--out", tmp_path / f"{words[0]}{words[1]}")
        assert done.returncode == 2, words
        assert re.search(cause, done.stderr.splitlines()[-1]), (words, done.stderr)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine", encoding="utf-8")
    done = modeclip_command("pilot", pairs, *SMALL, "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "is no pilot" in done.stderr
