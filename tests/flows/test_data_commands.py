"""The commands of the data half, one after the other on real icons, as a user gives them."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from modeclip.commands import main
from modeclip.data.catalog import Catalog


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """Run a command in this process and return its standard output."""
    arguments = [str(word) for word in words]
    if code:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    else:
        main(arguments)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of one icon set, embedded and clustered by the commands."""
    out = tmp_path_factory.mktemp("commands") / "catalog"
    main(["index", "icons", "--train-sets", "octicons", "--out", str(out)])
    main(["embed", str(out), "--encoder", "minilm"])
    main(["cluster", str(out), "--fine", "12", "--experts", "3", "--stability", "2", "--sweep-fine", "6", "12"])
    return out


@pytest.mark.slow
def test_the_steps_leave_columns_a_clustering_and_a_page(folder: Path):
    catalog = Catalog.open(folder)
    assert catalog.columns[-4:] == ["caption_embedding", "fine_cluster", "fine_distance", "expert"]
    sizes = [len(catalog.select(expert=k)) for k in range(3)]
    assert sum(sizes) == len(catalog)
    assert min(sizes) > 0
    cards = json.loads((folder / "clusters" / "cards.json").read_text())
    assert [card["size"] for card in cards["experts"]] == sizes
    found = json.loads((folder / "clusters" / "diagnostics.json").read_text())
    assert [trial["num_fine"] for trial in found["fine"]] == [6, 12]
    assert len(found["stability"]["pairs"]) == 1
    assert "Content-Security-Policy" in (folder / "clusters" / "atlas.html").read_text()


def test_each_step_given_again_does_only_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]):
    again = json.loads(run(capsys, "index", "icons", "--train-sets", "octicons", "--out", folder, "--json"))
    assert again["num_added"] == 0
    done = json.loads(run(capsys, "embed", folder, "--encoder", "minilm", "--json"))
    assert (done["num_captions"], done["num_computed"]) == (len(Catalog.open(folder)), 0)


@pytest.mark.slow
def test_results_are_tables_and_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ("cluster", folder, "--fine", "12", "--experts", "3")
    table = run(capsys, *words)
    assert all(word in table for word in ("key words", "negatives in batches", "clustering: ", "atlas: "))
    content = json.loads(run(capsys, *words, "--json"))
    assert sum(card["size"] for card in content["experts"]) == len(Catalog.open(folder))
    assert content["diagnostics"]["negatives"]["kinds"]


def test_a_sound_catalog_passes_the_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = json.loads(run(capsys, "check", folder, "--out", tmp_path / "check", "--json"))
    assert content["num_pairs"] == content["num_decoded"] == len(Catalog.open(folder))
    assert {path.name for path in (tmp_path / "check").iterdir()} == {"check.html", "contact.png"}


def test_a_damaged_one_does_not(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    catalog = Catalog.open(folder)
    pairs = catalog.read(["image", "caption"], np.arange(30))
    (tmp_path / "data").mkdir()
    for number, (image, caption) in enumerate(zip(pairs["image"], pairs["caption"], strict=True)):
        (tmp_path / "data" / f"{number:02d}.png").write_bytes(image)
        (tmp_path / "data" / f"{number:02d}.txt").write_text(caption)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted((tmp_path / "data").iterdir()):
            tar.add(path, path.name)
    run(capsys, "index", tmp_path / "0.tar", "--out", tmp_path / "out")
    assert run(capsys, "check", tmp_path / "out")
    (tmp_path / "0.tar").unlink()
    table = run(capsys, "check", tmp_path / "out", code=1)
    assert "error" in table


def test_ids_go_out_and_come_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "expert.npy"
    done = json.loads(run(capsys, "uids", folder, "--expert", "1", "--out", file, "--json"))
    assert done["written"] == len(np.load(file)) == len(Catalog.open(folder).select(expert=1))
    assert np.load(file).dtype == np.dtype("u8,u8")
    marked = json.loads(run(capsys, "uids", folder, "--keep", file, "--json"))
    assert (marked["kept"], marked["unknown"]) == (done["written"], 0)
    catalog = Catalog.open(folder)
    assert catalog.select(mask="kept").tolist() == catalog.select(expert=1).tolist()
    run(capsys, "uids", folder, "--mask", "kept", "--where", "width > 0", "--out", tmp_path / "again.npy")
    assert (tmp_path / "again.npy").read_bytes() == file.read_bytes()
    done = json.loads(run(capsys, "uids", folder, "--keep", file, "--into", "of_one", "--json"))
    assert done["of_one"] == len(catalog.select(expert=1))
    content = json.loads(run(capsys, "check", folder, "--mask", file, "--decode-samples", "9", "--json"))
    assert (content["num_pairs"], content["num_decoded"]) == (done["of_one"], 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embed", "nowhere"), "no catalog at 'nowhere'.*modeclip index.*correct the path"),
        (("cluster", "{folder}", "--fine", "0"), r"--fine: expected 1 or more, got 0"),
        (("cluster", "{folder}", "--fine", "100000"), r"--fit-samples|--fine is 100000"),
        (("cluster", "s3://bucket/none"), "is no catalog"),
        (
            ("uids", "{folder}"),
            r"uids: nothing to do.*--out FILE\.npy.*--keep FILE\.npy",
        ),
        (("uids", "{folder}", "--keep", "none.npy"), r"none\.npy"),
        (("uids", "{folder}", "--expert", "99", "--out", "none.npy"), "has no pair that --where 'expert=99' selects"),
        (
            ("uids", "{folder}", "--keep", "none.npy", "--into", "caption"),
            "column 'caption' .* is no mask.*another name",
        ),
        (("cluster", "{folder}", "--where", "expert > 99"), "no pair that --where 'expert > 99' selects"),
        (("check", "{folder}", "--mask", "expert"), r"--mask expert: column 'expert' holds int32, expected booleans"),
        (("index", "nowhere/none.tar"), r"none\.tar"),
        (("index", "icons", "--image-size", "0"), r"--image-size: expected 1 to 4,096, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SystemExit) as stop:
        main([word.format(folder=folder) for word in words])
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("modeclip: error: ")
    assert re.search(message, line)
