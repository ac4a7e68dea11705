"""Hashes of files and folders: every name and every byte counts, and nothing else."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from modeclip.system.files import hash_files, hash_folder, replacing


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
