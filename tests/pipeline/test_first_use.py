"""What the demo shows first: words that find held-out pictures, and pictures that are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle_edits import replace_expert
from modeclip.mixture.mode import MoDE
from modeclip.pipeline.first_use import first_use, held_out_index
from modeclip.search.index import Index
from modeclip.serving.service import open_service
from modeclip.system.paths import RunPaths

WORDS = ("heart", "calendar", "no caption has these words")


def test_words_and_pictures_are_answered_as_by_the_mixture(small_run: Path, tmp_path: Path) -> None:
    """Hits and answers are those of the mixture's own vectors, compared one by one."""
    paths = RunPaths(folder=Path(shutil.copytree(small_run, tmp_path / "run")))
    found = first_use(paths, WORDS)
    tasks, mode = Catalog.open(paths.tasks_path), MoDE.load(paths.bundle)
    captions = tasks.read(["caption"])["caption"].astype(str)
    assert found.pictures == len(tasks)

    pictures = tasks.images(np.arange(len(tasks)))
    preprocess = mode.task(["any"]).preprocess
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    for one in found.looked:  # each text is routed by itself
        task = mode.task([one.words], templates=["{}"])
        with torch.no_grad():
            scores = (task.encode_image(pixels) @ task.encode_text([one.words]).T).numpy()[:, 0]
        best = np.sort(scores)[::-1][:3]
        of_hits = [scores[captions == caption].max() for caption in one.captions]
        assert np.all(np.array(of_hits) >= best - 1e-3)  # the index keeps half precision
        assert one.expert == task.route.members[int(np.argmax(task.weights))]

    task = mode.task(list(WORDS), templates=["{}"])
    assert [one.caption for one in found.named] == ["heart", "calendar"]
    for named in found.named:
        row = int(np.flatnonzero(captions == named.caption)[0])
        (answer,) = task.classify([pictures[row]])
        assert (named.answer, named.picture) == (answer.classnames[0], tasks.read(["key"])["key"][row])
        assert abs(named.probability - answer.probabilities[0]) < 1e-5
        assert named.near
        assert named.expert in task.route.members

    service = open_service(paths.folder)  # what serves the run searches them too
    assert {name: len(index) for name, index in service.indexes.items()} == {
        "run": len(Catalog.open(paths.catalog_path)),
        "held-out": len(tasks),
    }
    service.close()


def test_an_edited_bundle_is_searched_with_the_models_that_it_has(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """modeclip builds its own indexes anew; one that was built otherwise stays."""
    paths = RunPaths(folder=Path(shutil.copytree(small_run, tmp_path / "run")))
    held_out_index(paths)
    open_service(paths.folder).close()
    own = Path(shutil.copytree(paths.index, tmp_path / "own"))
    opened = Index.open(paths.held_out_index)
    before = opened.search("heart").hits
    replace_expert(paths.bundle, 0, paths.bundle / "expert-1", force=True)

    capsys.readouterr()
    service = open_service(paths.folder)
    assert {name: len(index) for name, index in service.indexes.items()} == {
        "run": len(Catalog.open(paths.catalog_path)),
        "held-out": len(opened),
    }
    service.close()
    assert capsys.readouterr().err.count("bundle has changed: encode the images of ") == 2
    assert opened.search("heart").hits == before  # what was opened before goes on

    replace_expert(paths.bundle, 0, small_run / "bundle" / "expert-0", force=True)
    assert len(held_out_index(paths)) == len(opened)
    assert "bundle has changed: encode the images of " in capsys.readouterr().err

    replace_expert(paths.bundle, 0, paths.bundle / "expert-1", force=True)
    with pytest.raises(ModeclipError, match=r"own: was built with another model"):
        open_service(paths.folder, indexes=[own])
    shutil.rmtree(paths.index)
    Index.build(Catalog.open(paths.catalog_path), str(small_run / "bundle"), paths.index)
    with pytest.raises(ModeclipError, match=r"run/index: was built with another model"):
        open_service(paths.folder)
