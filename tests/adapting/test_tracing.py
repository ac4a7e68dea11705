"""What a trace counts is what the routers say of one pair after the other."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeclip.adapting.tracing import TOPIC_PAIRS, Trace, TraceConfig, trace
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.selection import Selection
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError
from modeclip.models.clip import Clip, encode_image, encode_text, load_clip
from modeclip.models.moe import moe_layers
from support import encode_picture, make_clip_moe, noise_picture, plain_png

NAMES = ("base", "stage 1", "stage 2")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip_moe(tmp_path_factory.mktemp("moe") / "model", num_experts=3, model="modeclip-icon-s")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Sixty pictures, two of which are damaged after they were indexed, with captions of several lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["filepath\ttitle"]
    words = ("arrow left", "red heart", "a much longer caption of a thing", "!", "house !")
    for number in range(60):
        picture = noise_picture(number) if number % 2 else plain_png((4 * number, 0, 200), (32, 32))
        data = picture if isinstance(picture, bytes) else encode_picture(picture)
        (folder / f"{number}.png").write_bytes(data)
        lines.append(f"{number}.png\t{words[number % 5]}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    index(DataConfig(source=str(folder / "pairs.tsv")), folder)
    for number in (7, 30):
        path = folder / f"{number}.png"
        path.write_bytes(b"x" * path.stat().st_size)
    catalog = Catalog.open(folder / "catalog.lance")
    catalog.add_columns({"third": np.arange(60) % 3, "share": np.linspace(0, 1, 60)}, facts={"made_by": "test"})
    return catalog


@pytest.fixture(scope="module")
def traced(catalog: Catalog, moe: Path) -> Trace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeclip.adapting.tracing.PAIRS_AT_ONCE", 16)
        return trace(catalog, moe, TraceConfig(num_shown=60), experts=NAMES)


def logits_of(clip: Clip, catalog: Catalog, row: int) -> dict[str, list[torch.Tensor]]:
    """Return the routers' logits for a pair's tokens by block, from what each layer is given when the pair is alone."""
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, __: inputs.append(given[0][0])) for layer in moe_layers(clip.model)
    ]
    with torch.no_grad():
        encode_image(clip.model, clip.images(catalog.images(np.array([row]))))
        num_image = len(inputs)
        encode_text(clip.model, clip.tokens(catalog.captions(np.array([row]))))
    for hook in hooks:
        hook.remove()
    layers = moe_layers(clip.model)
    logits = [x @ layer.router.weight.detach().T for x, layer in zip(inputs, layers, strict=True)]
    return {"image": logits[:num_image], "text": logits[num_image:]}


def test_counts_are_those_of_one_pair_after_the_other(traced: Trace, catalog: Catalog, moe: Path):
    clip = load_clip(moe)
    clip.model.eval()
    assert (traced.num_pairs, traced.num_unreadable, traced.top_k) == (58, 2, 2)
    first: dict[Any, Counter[int]] = {}
    chosen: dict[Any, Counter[int]] = {}
    chances: dict[Any, list[np.ndarray]] = {}
    assert sorted(pair.row for pair in traced.shown) == [row for row in range(60) if row not in (7, 30)]
    for pair in traced.shown:
        expected = logits_of(clip, catalog, pair.row)
        for tower in ("image", "text"):
            for block, (logits, found) in enumerate(zip(expected[tower], getattr(pair, tower), strict=True)):
                experts = logits.argsort(1, descending=True)[:, :2].numpy()
                chances.setdefault((tower, block), []).append(logits.softmax(1).numpy())
                np.testing.assert_array_equal(found, experts[:, 0])
                first.setdefault((tower, block), Counter()).update(experts[:, 0].tolist())
                chosen.setdefault((tower, block), Counter()).update(experts.ravel().tolist())
            share = np.mean([np.bincount(x.argmax(1).numpy(), minlength=3) / len(x) for x in expected[tower]], axis=0)
            np.testing.assert_allclose(getattr(pair, f"{tower}_share"), share)
    assert {(block.tower, block.index) for block in traced.blocks} == first.keys()
    balances = {
        key: 3 * sum(first[key][k] / first[key].total() * np.concatenate(chances[key])[:, k].mean() for k in range(3))
        for key in first
    }
    for block in traced.blocks:
        counts, total = first[block.tower, block.index], first[block.tower, block.index].total()
        np.testing.assert_allclose(block.first, [counts[k] / total for k in range(3)])
        through = chosen[block.tower, block.index]
        np.testing.assert_allclose(block.chosen, [through[k] / total for k in range(3)])
        assert block.balance == pytest.approx(balances[block.tower, block.index], rel=1e-4)
    for number, expert in enumerate(traced.experts):
        assert expert.name == NAMES[number]
        means = [block.first[number] for block in traced.blocks if block.tower == "text"]
        assert expert.text == pytest.approx(np.mean(means))
        shares = [pair.image_share[number] + pair.text_share[number] for pair in expert.pairs]
        assert shares == sorted(shares, reverse=True)
        assert len({pair.caption for pair in expert.pairs}) == len(expert.pairs)


def test_padding_counts_for_nothing_and_an_exclamation_mark_does(traced: Trace):
    pieces = {pair.caption: pair.pieces for pair in traced.shown}
    assert pieces["arrow left"] == ("", "arrow", "left", "")
    assert pieces["!"] == ("", "!", "")
    assert pieces["house !"] == ("", "house", "!", "")


def test_topics_are_words_or_the_groups_of_a_column(traced: Trace, catalog: Catalog, moe: Path):
    readable = [pair for pair in traced.shown if "arrow" in pair.caption]
    (arrow,) = [topic for topic in traced.topics if topic.name == "arrow"]
    assert arrow.num_pairs == len(readable) >= TOPIC_PAIRS
    np.testing.assert_allclose(arrow.text, np.mean([pair.text_share for pair in readable], axis=0))
    grouped = trace(catalog, moe, TraceConfig(topics="third"))
    assert grouped.topic_column == "third"
    assert sorted(topic.num_pairs for topic in grouped.topics) == [19, 19, 20]
    members = [pair.image_share for pair in traced.shown if pair.row % 3 == 2]
    assert any(np.allclose(topic.image, np.mean(members, axis=0)) for topic in grouped.topics)


def test_a_sample_is_drawn_from_the_selection_and_repeats(catalog: Catalog, moe: Path):
    config = TraceConfig(num_pairs=10, num_shown=4, num_examples=2)
    runs = [trace(catalog, moe, config, selection=Selection(where=("third=1",))) for _ in range(2)]
    assert runs[0].num_pairs + runs[0].num_unreadable == 10
    assert [pair.row for pair in runs[0].shown] == [pair.row for pair in runs[1].shown]
    assert all(pair.row % 3 == 1 for pair in runs[0].shown)
    assert len(runs[0].shown) == 4
    assert all(len(expert.pairs) <= 2 for expert in runs[0].experts)


def test_mistakes(catalog: Catalog, moe: Path, tmp_path: Path):
    with pytest.raises(ModeclipError, match="3 names of experts, got 2"):
        trace(catalog, moe, experts=("a", "b"))
    with pytest.raises(ModeclipError, match=r"topics: column 'share' holds double.*fine_cluster"):
        trace(catalog, moe, TraceConfig(topics="share"))
    with pytest.raises(ModeclipError, match="none of 2 images"):
        trace(catalog, moe, selection=Selection(where=("key in ('7.png', '30.png')",)))
    plain = make_clip_moe(tmp_path / "plain", num_experts=0)
    with pytest.raises(ModeclipError, match="has no experts"):
        trace(catalog, plain)
    shutil.rmtree(plain)
