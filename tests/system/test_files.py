"""Hashes of files and folders: every name and every byte counts, and nothing else."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from modeclip.errors import DamagedError
from modeclip.system.files import (
    find_damage,
    hash_files,
    hash_folder,
    note_files,
    read_json,
    replacing,
    to_json,
    write_json,
)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_hashes_of_files_are_by_their_name_in_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"x": "1", "sub/y": "2"})
    found = hash_files(folder, sorted(folder.rglob("*")))
    assert found == {"sub/y": sha256(b"2").hexdigest(), "x": sha256(b"1").hexdigest()}


def test_hash_of_a_folder_is_that_of_its_names_and_contents(tmp_path: Path) -> None:
    kinds = [{"x": "1", "sub/y": "2"}, {"x": "1", "sub/y": "3"}, {"x": "1", "sub/z": "2"}, {"x": "1", "y": "2"}]
    hashes = {hash_folder(write(tmp_path / str(number), files)) for number, files in enumerate(kinds)}
    assert len(hashes) == len(kinds)
    assert hash_folder(write(tmp_path / "again", kinds[0])) in hashes


def test_a_replaced_file_has_the_permissions_of_a_new_one(tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read."""
    path = tmp_path / "weights.safetensors"
    for umask, permissions in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with replacing(path) as part:
                save_file({"weight": np.ones(3)}, part)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == permissions


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path) as part:
        part.unlink()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "old"}


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    sizes: tuple[int, ...]
    share: float | None = None


def test_what_is_written_is_read_as_the_same_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"name": "a\N{LATIN SMALL LETTER E WITH ACUTE}", "sizes": [1, 2], "share": 1, "later": None})
    assert read_json(path, Record, "make it anew") == Record(name="a\xe9", sizes=(1, 2), share=1.0)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "EOF"),
        (b'{"name": "a", "siz', "EOF"),
        (b"[]", "object"),
        (b"{}", "name: Field required"),
        (b'"x"', "object"),
        (b"null", "object"),
        (b'{"name": "\xff", "sizes": []}', "unicode"),
        (b'{"name": "a", "sizes": ["1"]}', "sizes.0: .*integer"),
        (b'{"name": "a", "sizes": {}}', "sizes: "),
        (b"[" * 100_000, "recursion"),
        (None, "no such file"),
    ],
)
def test_a_damaged_record_is_one_line_with_the_file_and_the_remedy(
    tmp_path: Path, content: bytes | None, cause: str
) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedError, match=rf"record\.json: .*{cause}.*; make it anew$") as caught:
        read_json(path, Record, "make it anew")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_record_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"directory.*; make it anew"):
        read_json(tmp_path, Record, "make it anew")


def test_json_has_null_where_a_number_is_not_finite() -> None:
    content = {"a": [1.5, float("nan"), (float("-inf"),)], "b": np.float64("inf"), "c": True}
    assert json.loads(to_json(content)) == {"a": [1.5, None, [None]], "b": None, "c": True}


def test_a_noted_file_is_whole_until_a_byte_of_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "weights"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    note = note_files(tmp_path, [path])["sub/weights"]
    assert note["sha256"] == sha256(b"weights").hexdigest()
    assert find_damage(path, note) == ""
    os.utime(path, ns=(1, 1))  # copied
    assert find_damage(path, note) == ""
    path.write_bytes(b"weighty")
    assert "bytes" in find_damage(path, note)
    os.utime(path, ns=(note["time"], note["time"]))  # what a failing disk does; only its bytes can tell
    assert find_damage(path, note) == ""
    assert "bytes" in find_damage(path, note, deep=True)
    path.write_bytes(b"w")
    assert find_damage(path, note) == "1 bytes instead of 7"
    path.unlink()
    assert find_damage(path, note) == "missing"
    path.mkdir()
    assert find_damage(path, note) == "not a file"
