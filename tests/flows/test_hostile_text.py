"""Captions, class names, keys and paths that would act on a terminal, through the commands that show them."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from modeclip.commands import main
from support import encode_picture, noise_picture

Command = Callable[..., subprocess.CompletedProcess[str]]
HOSTILE = "[/bold]\x1b[31m:cat: [red]a\x07\u202egpj\x9b2J"
SHOWN = r"[/bold]\x1b[31m:cat: [red]a\x07\u202egpj\x9b2J"
ACTING = set("\x1b\x07\u202e\x9b\r")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A table of pictures with hostile captions, in a folder with a hostile name."""
    folder = tmp_path / "[bold]\x1b[1m"
    folder.mkdir()
    rows = []
    for number in range(16):
        path = folder / f"{number}[red]\x1b[2m.png"
        path.write_bytes(encode_picture(noise_picture(number)))
        rows.append((str(path), f"{HOSTILE} number {number % 8}"))
    rows.append((str(folder / "missing[red]\x1b[2m.png"), HOSTILE))
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return folder / "pairs.csv"


def shown_by(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """Run a command; return what it printed, in which nothing acts on a terminal."""
    try:
        main([str(word) for word in words])
        stopped = 0
    except SystemExit as stop:
        stopped = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert stopped == code, err
    assert not ACTING & set(out + err), words
    return out if "--json" in words else out + err


def test_captions_keys_and_paths(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    catalog = tmp_path / "cat[/]"
    shown_by(capsys, "index", source, "--out", catalog, "--max-skipped-fraction", 0.5)
    shown = shown_by(capsys, "check", catalog, "--out", tmp_path / "page[/bold]")
    assert r"\x1b[31m" in shown
    assert r"\u202e" in shown
    shown_by(capsys, "embed", catalog, "--encoder", "tfidf")
    shown_by(capsys, "cluster", catalog, "--fine", 4, "--experts", 2, "--batch-size", 4, "--num-batches", 2)
    assert "cat[/]" in shown_by(capsys, "cluster", catalog, "--fine", 4, "--experts", 2, "--num-batches", 0)
    content = json.loads(
        shown_by(capsys, "cluster", catalog, "--fine", 4, "--experts", 2, "--num-batches", 0, "--json")
    )
    assert content["folder"] == f"{catalog}/clusters"


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no\x1b[31m\nmodeclip: error: [/bold]"
    for words in (["train", missing], ["evaluate", missing, "--tasks", missing], ["index", missing], ["run", missing]):
        [line] = shown_by(capsys, *words, code=2).splitlines()
        assert line.startswith("modeclip: error: ")


def test_class_names_and_models(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, names = small_run / "bundle", f"{HOSTILE},heart"
    assert SHOWN in shown_by(capsys, "route", bundle, "--classes", names, "--explain").replace("\n", "")
    assert json.loads(shown_by(capsys, "route", bundle, "--classes", names, "--json"))["classes"][0]["name"] == HOSTILE
    picture = tmp_path / "a[red]\x1b[2m.png"
    picture.write_bytes(encode_picture(noise_picture(0)))
    assert SHOWN in shown_by(capsys, "classify", bundle, picture, "--classes", names)
    for name in ("[bold]\x1b[31mcat", "dog\u202e"):
        (tmp_path / "task[red]" / name).mkdir(parents=True)
        (tmp_path / "task[red]" / name / "0.png").write_bytes(picture.read_bytes())
    words = ["--tasks", tmp_path / "task[red]", "--out", tmp_path / "out"]
    shown = shown_by(capsys, "evaluate", f"[/]\x1b[5mone={bundle}", *words)
    assert r"[/]\x1b[5mone" in shown
    shown_by(capsys, "compare", tmp_path / "out", tmp_path / "out")
