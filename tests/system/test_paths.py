"""Byte ranges of many files are read quickly, and what happens to the files meanwhile is noticed."""

from __future__ import annotations

import builtins
import os
import pwd
import threading
import unicodedata
from pathlib import Path

import pytest

from modeclip.errors import ModeclipError
from modeclip.system import paths as places
from modeclip.system.paths import (
    MAX_OPEN_FILES,
    RunPaths,
    absolute,
    expand,
    expand_homes,
    folders_below,
    form_of,
    home,
    other_form,
    other_spelling,
    read_bytes,
)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_ranges_of_many_files_leave_few_open(tmp_path: Path):
    for number in range(3 * MAX_OPEN_FILES):
        (tmp_path / f"{number}").write_bytes(b"%06d" % number)
    before = open_descriptors()
    for number in range(3 * MAX_OPEN_FILES):
        assert read_bytes(str(tmp_path / f"{number}"), 3, 2) == (b"%06d" % number)[3:5]
    assert open_descriptors() <= before + MAX_OPEN_FILES


def test_a_file_that_is_replaced_grows_or_vanishes_is_noticed(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    assert read_bytes(str(path), 0, 5) == b"first"
    (tmp_path / "new").write_bytes(b"other")
    (tmp_path / "new").replace(path)
    assert read_bytes(str(path), 0, 5) == b"other"
    with path.open("ab") as file:
        file.write(b" and more")
    assert read_bytes(str(path), 5, 100) == b" and more"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_bytes(str(path), 0, 5)


def test_many_threads_read_the_right_bytes_while_files_are_opened_and_closed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(places, "MAX_OPEN_FILES", 2)
    for number in range(8):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 4096)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(400):
                number = (step * 7 + seed) % 8
                data = read_bytes(str(tmp_path / f"{number}"), step, 100)
                if data != bytes([number]) * 100:
                    wrong.append((number, data[:4]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:lance is not fork-safe", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_process_that_was_forked_reads_too(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_bytes(str(tmp_path / "file"), 2, 3) == b"234"
    read, write = os.pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "print", lambda *_: None)
        child = os.fork()
        if not child:
            os.write(write, read_bytes(str(tmp_path / "file"), 5, 2))
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"56"
    os.close(read)
    os.close(write)


def test_what_paths_have_in_common_is_left_out():
    assert folders_below(["/a/b/0.tar"]) == ["0"]
    assert folders_below(["/a/b/0.tar", "/a/c/0.tar", "/d.tar"]) == ["a/b/0", "a/c/0", "d"]
    assert folders_below(["/a/bb/0.tar", "/a/b/0.tar"]) == ["bb/0", "b/0"]
    assert folders_below([]) == []


def test_an_address_without_its_client_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    import fsspec

    def fail(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", fail)
    with pytest.raises(ModeclipError, match=r"not installed: pip install .*modeclip\[s3\]"):
        read_bytes("s3://bucket/0.tar")


# ---------------------------------------------------------------- homes and spellings


@pytest.fixture
def home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "me")


def test_a_tilde_is_the_home_folder_and_can_be_a_name(home_folder: str, tmp_path: Path):
    assert home("~/a") == f"{home_folder}/a"
    assert absolute("~") == home_folder
    assert absolute("./~/a") == str(tmp_path / "~/a")
    assert home("a~") == "a~"
    assert expand("~/a.tar::~/{b,c}.tar") == [f"{home_folder}/{name}.tar" for name in "abc"]
    assert RunPaths(folder=Path("~/run")).catalog_path == Path(home_folder, "run/catalog.lance")
    with pytest.raises(ModeclipError, match=r"no user.*'nobody-has-this-name'; write \./~nobody"):
        absolute("~nobody-has-this-name/a")
    root = pwd.getpwuid(0)
    assert home(f"~{root.pw_name}/a") == f"{root.pw_dir}/a"


def test_arguments_may_have_home_folders_behind_names(home_folder: str, tmp_path: Path):
    told = {
        "~/a": "HOME/a",
        "--out=~/a": "--out=HOME/a",
        "birds=~/a#expert-0": "birds=HOME/a#expert-0",
        "clip:~/a": "clip:HOME/a",
        "~/a::~/b": "HOME/a::HOME/b",
        "./~/a": f"{tmp_path}/~/a",
        "cat,~dog": "cat,~dog",
        "~/": "HOME/",
        "a ~ b": "a ~ b",
        "a photo of a {}": "a photo of a {}",
    }
    assert {text: expand_homes(text) for text in told} == {
        text: expected.replace("HOME", home_folder) for text, expected in told.items()
    }


def test_a_path_is_found_in_another_unicode_form(tmp_path: Path):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (tmp_path / nfd).mkdir()
    (tmp_path / nfd / f"{nfd}.PNG").write_text("")
    assert other_form(f"{tmp_path}/{nfc}") == f"{tmp_path}/{nfd}"
    assert other_form(f"{tmp_path}/{nfd}") is None, "it is there as it is"
    assert absolute(f"{tmp_path}/{nfc}") == f"{tmp_path}/{nfd}"
    assert other_spelling(f"{tmp_path}/{nfc}/{nfc}.png") == f"{tmp_path}/{nfd}/{nfd}.PNG"
    assert other_spelling(f"{tmp_path}/{nfc}/other.png") is None
    (tmp_path / nfc).mkdir()
    assert absolute(f"{tmp_path}/{nfc}") == f"{tmp_path}/{nfc}"
    assert (form_of(nfc), form_of(nfd)) == ("NFC", "NFD")


def test_names_that_fit_equally_well_are_not_chosen_between(tmp_path: Path):
    for name in ("a.PNG", "a.Png"):
        (tmp_path / name).write_text("")
    assert other_spelling(f"{tmp_path}/a.png") is None
