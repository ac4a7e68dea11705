"""Hashes of files and folders: every name and every byte counts, and nothing else."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from modeclip.system.files import hash_files, hash_folder


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
