"""The pool of models: never more than its budget in memory, the right one freed, damaged files refused at loading."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.factory import _find_checkpoint_in_dir

from modeclip.errors import ModeclipError
from modeclip.models import pool as pool_module
from modeclip.models.checkpoints import write_tensors
from modeclip.models.clip import PREFERRED_WEIGHTS, chosen_weights, load_clip, save_clip
from modeclip.models.pool import ModelPool, ModelRef

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model, as a bundle has it."""
    folder = tmp_path_factory.mktemp("bundle")
    save_clip(load_clip("modeclip-icon", seed=0), folder / "expert-0")
    return folder


def hashes_of(bundle: Path) -> dict[str, str]:
    files = [path for path in bundle.rglob("*") if path.is_file()]
    return {str(path.relative_to(bundle)): sha256(path.read_bytes()).hexdigest() for path in files}


class FakeModel(torch.nn.Module):
    """A model of 100 float32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(100))


@contextmanager
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Load small stand-ins, and yield the specifications in the order of the loads."""
    loads: list[str] = []

    def load(spec: str, *, seed: int | None) -> Any:
        assert seed is None
        loads.append(spec)
        return pool_module.Clip(model=FakeModel(), config={}, tokenizer=None, preprocess=None)

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "load_clip", load)
        yield loads


def ref(name: str, num_bytes: int = 400) -> ModelRef:
    return ModelRef(name=name, spec=name, digest=name, preprocess="", num_bytes=num_bytes)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=20), st.integers(1, 4), st.booleans())
def test_what_was_used_longest_ago_is_freed(asked: list[str], limit: int, by_bytes: bool) -> None:
    """A list that moves what is asked for to its end, and cuts its beginning, is the slow oracle."""
    with pytest.MonkeyPatch.context() as monkeypatch, fakes(monkeypatch) as loads:
        pool = ModelPool(max_bytes=400 * limit) if by_bytes else ModelPool(limit)
        kept: list[str] = []
        expected: list[str] = []
        for name in asked:
            if name not in kept:
                expected.append(name)
            kept = [*(other for other in kept if other != name), name][-limit:]
            pool.get(ref(name))
            assert len(pool) == len(kept)
        assert loads == expected


def test_groups_are_as_large_as_fit_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes(monkeypatch) as loads:
        pool = ModelPool(max_bytes=1000)
        sizes, last = [], None
        for clips in pool.groups([ref(name) for name in "aabcde"]):
            gc.collect()
            assert last is None or last() is None, "the group before is out of memory"
            sizes.append(list(clips))
            last = weakref.ref(clips[sizes[-1][0]].model)
        assert sizes == [["a", "b"], ["c", "d"], ["e"]]
        assert loads == list("abcde")
        with pytest.raises(ModeclipError, match=r"model big.*2,000 bytes.*1,000.*raise the budget"):
            pool.get(ref("big", 2000))


def test_threads_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes(monkeypatch) as loads, ThreadPoolExecutor(8) as threads:
        pool = ModelPool(2)
        found = list(threads.map(lambda name: (name, pool.get(ref(name))), "ab" * 40))
    assert sorted(loads) == ["a", "b"]
    assert len({(name, id(clip)) for name, clip in found}) == 2


def test_types_of_weights_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes(monkeypatch):
        pool = ModelPool()
        half = pool.get(ref("a"), dtype=torch.float16)
        assert half.model.weight.dtype == torch.float16
        assert pool.get(ref("a")).model.weight.dtype == torch.float32
        assert pool.get(ref("a"), dtype=torch.float16) is half


def test_reference_reads_no_weights_and_counts_what_they_take(bundle: Path) -> None:
    hashes = hashes_of(bundle)
    inside = ModelRef.of_bundle("expert-0", bundle, "expert-0", hashes)
    clip = ModelPool().get(inside)
    assert inside.num_bytes == sum(4 * value.numel() for value in clip.model.state_dict().values())
    assert inside.digest == ModelRef.of("x", bundle / "expert-0").digest
    assert not clip.model.training
    assert "parity.json" not in inside.file_hashes


def test_models_differ_whatever_their_weights_are_called(tmp_path: Path) -> None:
    pool = ModelPool()
    for name in ("model.safetensors", "pytorch_model.bin", "epoch_3.pth"):
        refs = []
        for seed in range(2):
            clip, folder = load_clip("modeclip-icon-xxs", seed=seed), tmp_path / f"{name}-{seed}"
            save_clip(clip, folder)
            (folder / WEIGHTS).unlink()
            if name.endswith(".safetensors"):
                write_tensors(folder / name, clip.model.state_dict())
            else:
                torch.save(clip.model.state_dict(), folder / name)
            refs.append(ModelRef.of(name, folder))
            assert refs[-1].num_bytes >= (folder / name).stat().st_size
        assert refs[0].digest != refs[1].digest
        assert pool.get(refs[0]) is not pool.get(refs[1])


def test_weights_are_chosen_as_open_clip_does(tmp_path: Path) -> None:
    names = [*PREFERRED_WEIGHTS, "delta.safetensors", "a.bin", "z.safetensors", "open_clip_notes.bin", "b.pth"]
    assert chosen_weights(tmp_path) is None
    for name in reversed(names):
        (tmp_path / name).touch()
        assert str(chosen_weights(tmp_path)) == _find_checkpoint_in_dir(tmp_path)


def test_damaged_file_is_named_when_its_model_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = hashes_of(bundle)
    read: list[Path] = []
    hash_file = pool_module.hash_file
    monkeypatch.setattr(pool_module, "hash_file", lambda path: read.append(path) or hash_file(path))
    weights = bundle / "expert-0" / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    wrong = ModelRef.of_bundle("expert-0", bundle, "expert-0", hashes)
    assert not read, "a reference reads nothing"
    with pytest.raises(ModeclipError, match=rf"expert-0/{WEIGHTS} differs from its hash.*get the bundle again"):
        ModelPool().get(wrong)
    weights.unlink()
    with pytest.raises(ModeclipError, match=rf"expert-0/{WEIGHTS} is missing; get the bundle again"):
        ModelPool().get(wrong)
    weights.write_bytes(content)
    read.clear()
    pool = ModelPool(1)
    with fakes(monkeypatch):
        for other in (wrong, ref("other"), wrong):
            pool.get(other)
    assert len(read) == len(wrong.file_hashes), "each file is hashed once, also if its model is loaded again"


@pytest.mark.parametrize("limits", [{"max_models": 0}, {"max_bytes": 0}])
def test_limits_below_one(limits: dict[str, int]) -> None:
    with pytest.raises(ModeclipError, match=f"{next(iter(limits))}: expected at least 1 .*got 0"):
        ModelPool(**limits)


def test_settings_of_a_model_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"open_clip_config\.json is missing; get the model again"):
        ModelRef.of_bundle("x", tmp_path, "expert-0", {})
    (tmp_path / "open_clip_config.json").write_text("[1]")
    with pytest.raises(ModeclipError, match="expected an object of settings"):
        ModelRef.of("x", tmp_path)
