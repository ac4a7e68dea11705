"""`modeclip route` and its picture: the numbers shown are those of the mixture, the words those of the clusters."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modeclip import MoDE
from modeclip.commands.mixture import classify, route
from modeclip.errors import ModeclipError

CLASSES = ["heart", "arrow left", "bell <b> & co", "book"]


@pytest.fixture(scope="module")
def mode(small_run: Path) -> MoDE:
    return MoDE.load(small_run / "bundle")


def test_json_has_the_weights_the_clusters_and_the_budget(
    small_run: Path, mode: MoDE, capsys: pytest.CaptureFixture[str]
) -> None:
    route(small_run / "bundle", ",".join(CLASSES), max_experts=1, as_json=True)
    content = json.loads(capsys.readouterr().out)
    expected = mode.route(CLASSES, max_experts=1)
    np.testing.assert_allclose([row["weights"] for row in content["classes"]], expected.class_weights, atol=1e-6)
    np.testing.assert_allclose(content["weights"], expected.class_weights.mean(axis=0), atol=1e-6)
    assert content["max_experts"] == 1
    assert content["experts"] == ["expert-0", "expert-1"]
    for row, reason in zip(content["classes"], expected.explain(), strict=True):
        assert [cluster["index"] for cluster in row["clusters"]] == [cluster.index for cluster in reason.clusters]
        assert row["clusters"][0]["captions"] == list(reason.clusters[0].captions)


def test_explain_shows_three_clusters_a_class_and_prompts_change_them(
    small_run: Path, mode: MoDE, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    route(small_run / "bundle", "heart,book", explain=True)
    explained = capsys.readouterr().out
    for reason in mode.route(["heart", "book"]).explain():
        for cluster in reason.clusters:
            assert f"{cluster.distance:.2f}" in explained
            assert cluster.captions[0] in explained
    route(small_run / "bundle", "heart,book")
    short = capsys.readouterr().out
    assert len(explained.splitlines()) == len(short.splitlines()) + 4
    route(small_run / "bundle", "heart,book", template=("a {} on a box",), as_json=True)
    prompted = json.loads(capsys.readouterr().out)
    expected = mode.route(["heart", "book"], templates=["a {c} on a box"])  # the same place for the name
    np.testing.assert_allclose(prompted["weights"], expected.class_weights.mean(axis=0), atol=1e-6)


def test_what_is_out_of_domain_is_said(small_run: Path, mode: MoDE, capsys: pytest.CaptureFixture[str]) -> None:
    """Icons' own names are at home; sentences on chemistry are not, with the numbers that say so."""
    strange = ["nucleophilic substitution of a benzene ring", "the enthalpy of formation of methane"]
    assert mode.bundle.fine_quantiles is not None
    known = mode.bundle.fine_quantiles.near
    assert known is not None
    captions = known.vectors * known.scale
    for names, expected in ((["heart", "book"], False), (strange, True)):
        route(small_run / "bundle", ",".join(names), as_json=True)
        content = json.loads(capsys.readouterr().out)
        assert content["out_of_domain"] is expected
        assert content["domain"]["names_out"] == (len(names) if expected else 0)
        vectors = mode.route(names).embeddings
        assert vectors is not None
        for row, vector in zip(content["classes"], vectors, strict=True):
            gap = np.linalg.norm(captions - vector, axis=1).min()
            assert row["distance"] == pytest.approx(gap, abs=1e-5)
            assert row["out_of_domain"] is bool(gap > known.quantiles.threshold(0.9)[0])
            assert (row["quantile"] > 0.9) is row["out_of_domain"]
    picture = Path(__file__).parents[2] / "docs" / "assets" / "heart.png"
    classify(small_run / "bundle", (picture,), ",".join(strange), as_json=True)
    printed = capsys.readouterr()
    assert "out of domain: 2 of 2 names" in " ".join(printed.err.split())
    [record] = json.loads(printed.out)
    assert record["out_of_domain"] is True
    assert [found["out_of_domain"] for found in record["classes"]] == [True, True]
    results = json.loads((small_run / "results.json").read_text())
    assert all(task["out_of_domain"] is False for task in results["routing"].values())
    assert all(task["domain"]["names"] == len(task["classes"]) for task in results["routing"].values())


def test_a_folder_is_classified_in_spite_of_its_bad_pictures(
    small_run: Path, tmp_path: Path, modeclip_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    heart = (Path(__file__).parents[2] / "docs" / "assets" / "heart.png").read_bytes()
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "deep.PNG").write_bytes(heart)
    (tmp_path / "a" / "cut.png").write_bytes(heart[:100])
    (tmp_path / "a" / "empty.png").touch()
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "single.png").write_bytes(heart)
    asked = ("--classes", "heart,book", "--json")
    done = modeclip_command("classify", small_run / "bundle", tmp_path / "a", tmp_path / "single.png", *asked)
    assert done.returncode == 0
    records = {record["picture"]: record for record in json.loads(done.stdout)}
    names = ("a/cut.png", "a/empty.png", "a/b/deep.PNG", "single.png")
    assert list(records) == [str(tmp_path / name) for name in names]
    assert ["error" in records[str(tmp_path / name)] for name in names] == [True, True, False, False]
    assert records[str(tmp_path / names[2])]["classes"] == records[str(tmp_path / names[3])]["classes"]
    none = modeclip_command("classify", small_run / "bundle", tmp_path / "a" / "cut.png", tmp_path / "gone.png", *asked)
    assert none.returncode == 2
    assert ["error" in record for record in json.loads(none.stdout)] == [True, True]
    assert "none of 2 pictures can be read" in none.stderr
    (tmp_path / "void").mkdir()
    empty = modeclip_command("classify", small_run / "bundle", tmp_path / "void", *asked)
    assert (empty.returncode, empty.stderr.count("holds no picture")) == (2, 1)


def test_class_files_with_nul_bytes_are_one_line(
    small_run: Path, tmp_path: Path, modeclip_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "names.txt").write_bytes(b"cat\0\ndog\n")
    for command in (("route", small_run / "bundle"), ("classify", small_run / "bundle", tmp_path / "x.png")):
        done = modeclip_command(*command, "--classes", tmp_path / "names.txt")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "NUL byte" in done.stderr
    for name in ("caf\udce9", "a\0b"):
        with pytest.raises(ModeclipError, match=r"not UTF-8 text|NUL byte"):
            MoDE.load(small_run / "bundle").route([name, "b"])


def test_what_cannot_be_asked(small_run: Path, tmp_path: Path) -> None:
    bundle = small_run / "bundle"
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ModeclipError, match="route: give either --classes"):
        route(bundle)
    with pytest.raises(ModeclipError, match=r"route\.gif.*\.svg or \.png"):
        route(bundle, "a,b", picture=tmp_path / "route.gif")
    with pytest.raises(ModeclipError, match=r"there is no folder .*nowhere"):
        route(bundle, "a,b", picture=tmp_path / "nowhere" / "route.svg")
    with pytest.raises(ModeclipError, match="image does not decode"):
        route(bundle, images=(tmp_path / "text.png",))
    with pytest.raises(ModeclipError, match="max_memory: an expert takes"):
        classify(bundle, (Path(__file__).parents[2] / "docs" / "assets" / "heart.png",), "a,b", max_memory=1e-6)
    with pytest.raises(ModeclipError, match=r"clusters are of texts \(encoder minilm\).*route class names"):
        route(bundle, images=(Path(__file__).parents[2] / "docs" / "assets" / "heart.png",))
