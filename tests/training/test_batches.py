"""Batches: pure functions of the step, whoever prepares them and whatever is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeclip.data.catalog import Catalog
from modeclip.models.clip import load_clip
from modeclip.training.batches import CROP_STREAM, Feed, Order, batch_rows, draws_of, keeps, permute
from modeclip.training.jobs import EngineConfig, TrainConfig
from modeclip.training.objectives.objective import CAPTION_IDS

CONFIG = TrainConfig(model="modeclip-icon-xxxs", samples=32 * 32, batch_size=32)


def make_feed(catalog: Path, config: TrainConfig, **changes: object) -> Feed:
    clip = load_clip(config.model, seed=0)
    settings = {"rows": torch.arange(300), "tokenizer": clip.tokenizer, "preprocess": clip.preprocess}
    settings |= {"catalog": str(catalog), "config": config, "image_size": clip.image_size}
    settings |= {"caption_ids": config.mask_same_captions}
    return Feed(**settings | changes)  # type: ignore[arg-type]


@given(count=st.integers(1, 3000), seed=st.integers(0, 5), stream=st.integers(0, 9))
def test_permutation_hits_every_position_once(count: int, seed: int, stream: int) -> None:
    found = permute(np.arange(count, dtype=np.int64), count, seed, stream)
    assert sorted(found.tolist()) == list(range(count))


def test_permutation_mixes() -> None:
    """Neighbours go anywhere: over many permutations, each position gets each value about equally often."""
    counts = np.zeros((10, 10))
    for stream in range(2000):
        counts[np.arange(10), permute(np.arange(10, dtype=np.int64), 10, 0, stream)] += 1
    assert abs(counts / 200 - 1).max() < 0.3  # the deviation of a fair one is 0.067, of 100 the largest about 0.2
    long = permute(np.arange(100_000, dtype=np.int64), 100_000, 0, 0)
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.02


@given(first=st.integers(0, 60), count=st.integers(1, 9))
def test_random_numbers_of_a_part_are_those_of_the_whole(first: int, count: int) -> None:
    whole = draws_of(3, 8, 0, 70)
    assert (draws_of(3, 8, first, first + count) == whole[first : first + count]).all()
    assert (whole == np.random.Generator(np.random.Philox(key=[3, CROP_STREAM + 8])).random(whole.shape)).all()


@settings(max_examples=30)
@given(count=st.integers(8, 200), batch=st.integers(2, 8), seed=st.integers(0, 3))
def test_batches_are_permutations_of_the_rows(count: int, batch: int, seed: int) -> None:
    rows = np.arange(count, dtype=np.int64) * 3
    per_pass = count // batch
    for first in (0, per_pass):
        seen = np.concatenate([batch_rows(rows, first + step, batch, seed) for step in range(per_pass)])
        assert len(set(seen.tolist())) == per_pass * batch
        assert set(seen.tolist()) <= set(rows.tolist())
    assert (batch_rows(rows, per_pass, batch, seed) == batch_rows(rows, per_pass, batch, seed)).all()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_pass_reads_each_row_with_its_probability(seed: int) -> None:
    """Over 400 passes, as often as a binomial of this probability is in all but one of a billion cases."""
    rows, passes = np.arange(5, 305), 400
    probability = np.tile(np.array([0, 0.02, 0.3, 0.5, 0.9, 1], np.float32), 50)
    counts = sum(keeps(rows, probability, seed, number).astype(int) for number in range(passes))
    deviation = np.sqrt(passes * probability * (1 - probability))
    assert (abs(counts - passes * probability) <= 6.1 * deviation + 0.5).all()
    assert set(counts[probability == 0]) == {0}
    assert set(counts[probability == 1]) == {passes}
    totals = np.array([keeps(rows, probability, seed, number).sum() for number in range(passes)])
    assert abs(totals.var() / (probability * (1 - probability)).sum() - 1) < 0.4  # rows are drawn independently


def test_what_is_drawn_depends_on_the_row_and_not_on_the_others() -> None:
    rows = np.array([3, 8, 1 << 40, 77, 5])
    probability = np.array([0.4, 0.5, 0.6, 0.5, 0.3], np.float32)
    some = [1, 2, 4]
    for number in range(50):
        whole = keeps(rows, probability, 3, number)
        assert (keeps(rows[some], probability[some], 3, number) == whole[some]).all()
        assert (keeps(rows, probability / 2, 3, number) <= whole).all()  # who is rarer is drawn less often, never more


@settings(max_examples=8)
@given(count=st.integers(30, 90), batch=st.integers(2, 8), seed=st.integers(0, 3), data=st.data())
def test_batches_are_those_of_the_passes_one_after_the_other(
    count: int, batch: int, seed: int, data: st.DataObject
) -> None:
    """The slow oracle draws every pass in turn and cuts it into batches; some passes have none."""
    rows = np.arange(count, dtype=np.int64) * 3
    probability = np.random.default_rng(seed).random(count).astype(np.float32) ** data.draw(st.integers(1, 6))
    expected: list[list[int]] = []
    for number in range(12):
        kept = rows[keeps(rows, probability, seed, number)]
        order = kept[permute(np.arange(len(kept)), len(kept), seed, number)] if len(kept) else kept
        expected += [order[first : first + batch].tolist() for first in range(0, len(kept) - batch + 1, batch)]
    running = Order(rows, batch, seed, probability)
    assert [running.batch(step).tolist() for step in range(len(expected))] == expected
    assert all(len(set(one)) == batch for one in expected)
    for step in data.draw(st.lists(st.integers(0, max(len(expected) - 1, 0)), max_size=4)) if expected else []:
        resumed = Order(rows, batch, seed, probability)
        assert resumed.batch(step).tolist() == expected[step]
        assert resumed.batch(step, slice(0, batch, 2)).tolist() == expected[step][::2]
        assert resumed.batch(0).tolist() == expected[0]


def test_a_probability_of_one_changes_no_batch() -> None:
    rows = np.arange(100, dtype=np.int64)
    always = Order(rows, 8, 1, np.ones(100, np.float32))
    for step in (0, 11, 12, 40):
        assert always.batch(step).tolist() == batch_rows(rows, step, 8, 1).tolist()


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch=st.integers(2, 9),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_batches_of_groups_leave_no_row_out(sizes: list[int], batch: int, seed: int, data: st.DataObject) -> None:
    """Each pass: every row, less than a batch of them twice, and as many batches of one group as the groups fill."""
    draw = np.random.default_rng(seed)
    groups = draw.permutation(np.repeat(np.arange(len(sizes)) * 7 - 20, sizes))
    count = len(groups)
    rows = np.sort(draw.choice(10 * count, count, replace=False))
    if count < batch:
        return
    group_of_row = dict(zip(rows.tolist(), groups.tolist(), strict=True))
    order, per_pass = Order(rows, batch, seed, None, groups), -(-count // batch)
    passes = [[order.batch(first + step).tolist() for step in range(per_pass)] for first in (0, per_pass)]
    for one in passes:
        seen = [row for rows_of_step in one for row in rows_of_step]
        assert set(seen) == set(rows.tolist())
        assert len(seen) - count < batch
        assert all(len(set(rows_of_step)) == batch for rows_of_step in one)
        pure = [len({group_of_row[row] for row in rows_of_step}) == 1 for rows_of_step in one]
        assert sum(pure) >= sum(size // batch for size in sizes)
    step = data.draw(st.integers(0, 2 * per_pass - 1))
    resumed = Order(rows, batch, seed, None, groups)
    assert resumed.batch(step).tolist() == (passes[0] + passes[1])[step]
    assert resumed.batch(step, slice(1, batch, 2)).tolist() == (passes[0] + passes[1])[step][1::2]


def test_groups_are_in_another_order_each_pass() -> None:
    rows, groups = np.arange(64), np.repeat(np.arange(4), 16)
    order = Order(rows, 8, 0, None, groups)
    passes = [[order.batch(first + step) for step in range(8)] for first in (0, 8, 16)]
    kinds = {tuple(int(groups[batch[0]]) for batch in one) for one in passes}
    assert len(kinds) == 3
    assert len({frozenset(batch.tolist()) for one in passes for batch in one}) == 24  # other rows meet, too


def test_groups_and_probabilities_together() -> None:
    """A pass draws as without groups, and leaves none of what it drew out."""
    rows, groups = np.arange(200) * 2, np.arange(200) % 3
    probability = np.full(200, 0.4, np.float32)
    order, step = Order(rows, 8, 5, probability, groups), 0
    for number in range(3):
        kept = rows[keeps(rows, probability, 5, number)]
        steps = -(-len(kept) // 8)
        seen = np.concatenate([order.batch(step + i) for i in range(steps)])
        assert set(seen.tolist()) == set(kept.tolist())
        step += steps


@pytest.mark.parametrize(("workers", "drawn"), [(0, False), (0, True), pytest.param(1, True, marks=pytest.mark.slow)])
def test_workers_and_processes_share_one_order(icons_catalog: Path, workers: int, drawn: bool) -> None:
    config = replace(CONFIG, mask_same_captions=True, engine=EngineConfig(workers=workers))
    more: dict[str, object] = {"probability": torch.linspace(0.3, 1, 300) if drawn else None}
    more["groups"] = torch.arange(300) % 7 if drawn else None
    whole = [batch for batch, _ in make_feed(icons_catalog, CONFIG, **more).batches(range(4, 12))]
    halves = [
        [batch for batch, _ in make_feed(icons_catalog, config, rank=rank, world_size=2, **more).batches(range(4, 12))]
        for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.images, torch.cat([half[step].images for half in halves]))
        assert torch.equal(batch.tokens, torch.cat([half[step].tokens for half in halves]))
        ids = torch.cat([half[step].extras[CAPTION_IDS] for half in halves]).tolist()
        texts = [tuple(row) for row in batch.tokens.tolist()]
        assert [ids.index(value) for value in ids] == [texts.index(text) for text in texts]


def read_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list that the rows of all pictures read from now on are added to."""
    rows: list[int] = []
    images = Catalog.images

    def counted(self: Catalog, asked: np.ndarray) -> list[Image.Image]:
        rows.extend(asked.tolist())
        return images(self, asked)

    monkeypatch.setattr(Catalog, "images", counted)
    return rows


def test_kept_pictures_change_nothing_and_are_read_once(icons_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes over 300 rows, for two jobs of one process, one of which masks equal captions."""
    config, masked = CONFIG, replace(CONFIG, mask_same_captions=True)
    never = replace(masked, engine=EngineConfig(keep_pictures_gb=0.0))
    steps, kept = range(3 * (300 // CONFIG.batch_size)), {}
    plain = [batch for batch, _ in make_feed(icons_catalog, never).batches(steps)]
    rows = read_rows(monkeypatch)
    list(make_feed(icons_catalog, config, kept=kept).batches(steps))
    for batch, (again, _) in zip(plain, make_feed(icons_catalog, masked, kept=kept).batches(steps), strict=True):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.tokens, again.tokens)
        assert torch.equal(batch.extras[CAPTION_IDS], again.extras[CAPTION_IDS])
    assert len(kept) > 288  # three passes leave out another rest each
    # two threads that read ahead may both miss a row when a pass ends and the next begins
    assert len(rows) <= len(kept) + 4 * CONFIG.batch_size


def test_pictures_that_do_not_all_fit_are_not_kept(icons_catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_picture = 1000 + 4 * 32 * 32  # bytes of an icon with its tokens
    for gigabytes, twice in ((301 * a_picture / 1e9, False), (299 * a_picture / 1e9, True)):
        config = replace(CONFIG, engine=EngineConfig(keep_pictures_gb=gigabytes))
        feed = make_feed(icons_catalog, config)
        feed.piece(0, 0, 32)
        rows = read_rows(monkeypatch)
        feed.piece(0, 0, 32)
        assert bool(rows) is twice
