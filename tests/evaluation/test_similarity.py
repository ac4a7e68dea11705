"""Similarities block by block against sums that are written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeclip.evaluation import similarity
from modeclip.evaluation.similarity import Similarity
from support import unit_rows


def oracle(of: Similarity) -> np.ndarray:
    """Sum p_c <u_c, v_c>, a pair at a time, in float64."""
    num_images, num_texts = of.shape
    total = np.zeros((num_images, num_texts))
    for image in range(num_images):
        for text in range(num_texts):
            for expert, (visual, words) in enumerate(zip(of.images, of.texts, strict=True)):
                row = of.weights if of.weights.ndim == 1 else of.weights[image if of.per_image else text]
                total[image, text] += row[expert] * float(visual[image].astype(float) @ words[text].astype(float))
    return total


def drawn(weighted: str, scales: np.ndarray | None = None) -> Similarity:
    """Two experts of different widths, 11 images, 7 texts; weights of the task, each text or each image."""
    rng = np.random.default_rng(4)
    return Similarity(
        images=[unit_rows(11, 5, rng), unit_rows(11, 3, rng)],
        texts=[unit_rows(7, 5, rng), unit_rows(7, 3, rng)],
        weights=rng.dirichlet([1, 1], size={"task": (), "text": (7,), "image": (11,)}[weighted]),
        per_image=weighted == "image",
        scales=scales,
    )


@pytest.mark.parametrize("weighted", ["task", "text", "image"])
def test_log_probabilities_are_over_all_texts(weighted: str) -> None:
    """sum_c p_c log(exp(s_c <u_c, v_c>) / sum over the classes), a pair at a time; a block of some texts too."""
    of = drawn(weighted, scales=np.array([3.0, 90.0]))
    wanted = np.zeros((11, 7))
    assert of.scales is not None
    for image in range(11):
        for visual, words, scale, weights in zip(of.images, of.texts, of.scales, of.weights.T, strict=True):
            chances = [math.exp(scale * float(visual[image].astype(float) @ word.astype(float))) for word in words]
            for text, chance in enumerate(chances):
                share = weights if weights.ndim == 0 else weights[image if of.per_image else text]
                wanted[image, text] += share * math.log(chance / math.fsum(chances))
    np.testing.assert_allclose(of.block(slice(None)), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of.block(slice(2, 9), slice(1, 4)), wanted[2:9, 1:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", ["task", "text", "image"])
def test_blocks_are_weighted_sums_of_cosines(weighted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = drawn(weighted)
    wanted = oracle(of)
    np.testing.assert_allclose(of.block(slice(2, 9), slice(1, 4)), wanted[2:9, 1:4], atol=1e-6)
    monkeypatch.setattr(similarity, "BLOCK_NUMBERS", 20)  # two images at a time
    found = list(of.blocks())
    assert [rows for rows, _ in found] == [slice(start, min(start + 2, 11)) for start in range(0, 11, 2)]
    np.testing.assert_allclose(np.concatenate([block for _, block in found]), wanted, atol=1e-6)


@given(st.integers(0, 2))
def test_weighted_sums_do_not_depend_on_the_order_of_the_experts(turn: int) -> None:
    rng = np.random.default_rng(2)
    images, texts, weights = rng.normal(size=(3, 4, 6)), rng.normal(size=(3, 5, 6)), np.array([0.5, 0.3, 0.2])
    order = np.roll(np.arange(3), turn)
    blocks = [
        Similarity(
            images=list(images[rows].astype(np.float32)),
            texts=list(texts[rows].astype(np.float32)),
            weights=weights[rows],
        ).block(slice(None))
        for rows in (np.arange(3), order)
    ]
    np.testing.assert_allclose(*blocks, atol=1e-5)


def test_a_weighted_sum_is_the_product_of_concatenated_vectors() -> None:
    """sum_c p_c <u_c, v_c> = <concat(p_c u_c), concat(v_c)> (METHOD 1.3)."""
    rng = np.random.default_rng(1)
    images, texts, weights = (
        [unit_rows(4, 6, rng), unit_rows(4, 6, rng)],
        [unit_rows(5, 6, rng), unit_rows(5, 6, rng)],
        np.array([0.3, 0.7]),
    )
    joined = np.hstack(images) @ np.hstack([w * words for w, words in zip(weights, texts, strict=True)]).T
    np.testing.assert_allclose(
        Similarity(images=images, texts=texts, weights=weights).block(slice(None)), joined, atol=1e-6
    )
