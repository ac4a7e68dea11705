"""Hashes of files and folders: every name and every byte counts, and nothing else; locks that say who holds them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from modeclip.errors import DamagedError, ModeclipError
from modeclip.system.files import (
    PART_SECONDS,
    find_damage,
    hash_files,
    hash_folder,
    holder_of,
    note_files,
    only_process,
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
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "folder", {})
    (tmp_path / "folder").rmdir()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "old"}


def test_a_file_that_several_write_at_once_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write_often(number: int) -> None:
        for _ in range(50):
            write_json(path, [number] * 1000)
            assert len(set(read_json(path, list[int], ""))) == 1
            with replacing(path) as part:
                part.write_text(json.dumps([number] * 500))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_often, range(4)))
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_was_writing_goes_with_the_next_file(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from modeclip.system.files import replacing\n"
        "with replacing(Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], check=False)
    [left] = tmp_path.iterdir()
    elsewhere = tmp_path / "file.00000000-1-00000000.part"  # of another machine
    elsewhere.touch()
    with replacing(tmp_path / "long") as part:
        write_json(tmp_path / "file", {})
        assert set(tmp_path.iterdir()) == {part, elsewhere, tmp_path / "file"}
        assert not left.exists()
    os.utime(elsewhere, (0, time.time() - PART_SECONDS - 1))
    write_json(tmp_path / "file", {})
    assert {path.name for path in tmp_path.iterdir()} == {"file", "long"}


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


def write_holder(folder: Path, silence: float, **changes: object) -> None:
    """Leave the lock of a process of another machine, whose last sign of life is so many seconds old."""
    holder = {"process": 7, "machine": "far", "boot": "b", "since": "2026-01-01 10:00:00+00:00"} | changes
    (folder / "lock").write_text(json.dumps(holder))
    then = time.time() - silence
    os.utime(folder / "lock", (then, then))


def test_a_lock_tells_who_holds_it_and_is_free_afterwards(tmp_path: Path) -> None:
    assert holder_of(tmp_path) is None
    with only_process(tmp_path):
        holder = holder_of(tmp_path)
        assert holder is not None
        assert (holder.process, holder.is_elsewhere) == (os.getpid(), False)
        with pytest.raises(ModeclipError, match=rf"process {os.getpid()} of .+, since 20.+, is at work.*wait for it"):
            only_process(tmp_path).__enter__()
        assert holder_of(tmp_path) == holder
    assert holder_of(tmp_path) is None
    with only_process(tmp_path):
        pass


def test_a_child_that_was_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from pathlib import Path; from modeclip.system.files import only_process\n"
        "lock = only_process(Path(sys.argv[1])); lock.__enter__()\n"
        "child = os.fork()\n"
        "if not child: os.close(1); time.sleep(600)\n"
        "print(child, flush=True); os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], stdout=subprocess.PIPE, check=True
    )
    child = int(done.stdout)
    try:
        os.kill(child, 0)
        assert holder_of(tmp_path) is None
        with only_process(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_process_of_another_machine_is_believed_while_it_shows_life(tmp_path: Path) -> None:
    """Its lock may be invisible here; and a file system may keep the lock of a machine that is gone."""
    write_holder(tmp_path, 60)
    holder = holder_of(tmp_path)
    assert holder is not None
    assert holder.is_elsewhere
    with pytest.raises(ModeclipError, match="process 7 of far, since 2026-01-01 10:00:00"):
        only_process(tmp_path).__enter__()
    write_holder(tmp_path, 300)
    assert holder_of(tmp_path) is None
    with only_process(tmp_path):
        pass
    write_holder(tmp_path, 300)
    with (tmp_path / "lock").open("rb") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        assert holder_of(tmp_path) is None
        with only_process(tmp_path, patience_seconds=60.0):
            found = holder_of(tmp_path)
            assert found is not None
            assert found.process == os.getpid()


def test_a_process_at_work_shows_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeclip.system.files.HEARTBEAT_SECONDS", 0.01)
    with only_process(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": 3}', b"\xff"])
def test_a_lock_that_does_not_tell_is_held_by_another_process(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    assert holder_of(tmp_path) is None
    with (tmp_path / "lock").open("rb") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        assert str(holder_of(tmp_path)) == "another process"
    with only_process(tmp_path):
        pass
