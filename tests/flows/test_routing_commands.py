"""`modeclip route` and its picture: the numbers shown are those of the mixture, the words those of the clusters."""

from __future__ import annotations

import json
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
    small_run: Path, mode: MoDE, capsys: pytest.CaptureFixture[str]
) -> None:
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
