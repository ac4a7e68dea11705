from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

import modeclip.evaluation.retrieval as retrieval
from modeclip.errors import ModeclipError
from modeclip.evaluation.intervals import Outcome, PairedTest, bootstrap_interval, paired_interval, paired_test
from modeclip.evaluation.retrieval import retrieve
from modeclip.evaluation.similarity import Similarity
from support import unit_rows


def few_directions(draw: np.random.Generator, count: int) -> np.ndarray:
    """Unit vectors of which many are equal, whose products are exact: every tie is a real one."""
    return np.eye(4, dtype=np.float32)[draw.integers(0, 4, count)]


def sort_all(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oracle: sort every candidate of every query (rows) and look for the first right one."""
    order = np.argsort(-scores, axis=1, kind="stable")
    hit = np.take_along_axis(right, order, axis=1)
    return np.where(hit.any(1), hit.argmax(1), scores.shape[1]), order[:, 0]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_places_and_recalls_are_those_of_the_whole_matrix_sorted(
    monkeypatch: pytest.MonkeyPatch, tied: bool, shuffled: bool
) -> None:
    monkeypatch.setattr(retrieval, "IMAGES_AT_ONCE", 7)
    monkeypatch.setattr(retrieval, "TEXTS_AT_ONCE", 11)
    draw = np.random.default_rng(3)
    image_of_text = np.sort(draw.integers(0, 40, 90))
    if shuffled:
        draw.shuffle(image_of_text)
    make = few_directions if tied else lambda draw, count: unit_rows(count, 5, draw)
    images, texts = [make(draw, 40) for _ in range(3)], [make(draw, 90) for _ in range(3)]
    per_query = draw.choice([0.25, 0.5, 1.0], (90, 3))
    of_texts = Similarity(images=images, texts=texts, weights=per_query)
    of_images = Similarity(images=images, texts=texts, weights=np.array([0.5, 0.25, 0.25]))

    outcome = retrieve(of_texts, image_of_text, (1, 5, 10), to_texts=of_images)

    right = np.arange(40)[:, None] == image_of_text
    text_rank, text_best = sort_all(of_texts.block(slice(None)).T, right.T)
    image_rank, image_best = sort_all(of_images.block(slice(None)), right)
    has_text = right.any(1)
    assert 0 < has_text.sum() < 40
    np.testing.assert_array_equal(outcome.rank, [*text_rank, *image_rank])
    np.testing.assert_array_equal(outcome.prediction, [*text_best, *image_best])
    for k in (1, 5, 10):
        assert outcome.metrics[f"image_retrieval_recall@{k}"] == (text_rank < k).mean()
        assert outcome.metrics[f"text_retrieval_recall@{k}"] == (image_rank < k)[has_text].mean()


def test_one_similarity_for_both_directions_is_two_equal_ones() -> None:
    draw = np.random.default_rng(0)
    both = Similarity(images=[unit_rows(30, 4, draw)], texts=[unit_rows(60, 4, draw)], weights=np.ones(1))
    image_of_text = np.arange(60) // 2
    once, twice = retrieve(both, image_of_text), retrieve(both, image_of_text, to_texts=both)
    assert once.metrics == twice.metrics
    np.testing.assert_array_equal(once.rank, twice.rank)


@pytest.mark.parametrize("captions", [1, 5])
def test_recalls_are_those_of_clip_benchmark(captions: int) -> None:
    draw = np.random.default_rng(captions)
    images = unit_rows(60, 12, draw)
    image_of_text = np.repeat(np.arange(60), captions)
    texts = images[image_of_text] + 0.35 * draw.normal(size=(60 * captions, 12)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)

    ours = retrieve(Similarity(images=[images], texts=[texts], weights=np.ones(1)), image_of_text).metrics

    scores = torch.from_numpy(texts) @ torch.from_numpy(images).T
    pairs = torch.zeros_like(scores, dtype=torch.bool)
    pairs[torch.arange(len(texts)), torch.from_numpy(image_of_text)] = True
    for k in (1, 5, 10):
        of_texts = batchify(recall_at_k, scores, pairs, 16, "cpu", k=k)
        of_images = batchify(recall_at_k, scores.T, pairs.T, 16, "cpu", k=k)
        assert ours[f"image_retrieval_recall@{k}"] == pytest.approx(float((of_texts > 0).float().mean()), abs=1e-6)
        assert ours[f"text_retrieval_recall@{k}"] == pytest.approx(float((of_images > 0).float().mean()), abs=1e-6)
    assert 0 < ours["image_retrieval_recall@1"] < 1


def test_samples_weigh_texts_and_images_alike() -> None:
    draw = np.random.default_rng(1)
    similarity = Similarity(images=[unit_rows(20, 3, draw)], texts=[unit_rows(90, 3, draw)], weights=np.ones(1))
    outcome = retrieve(similarity, draw.integers(0, 19, 90), (5, 1))  # image 19 has no text
    assert outcome.main == "mean_recall@5"
    assert np.average(outcome.hits, weights=outcome.weights) == pytest.approx(outcome.score)
    both = outcome.metrics["image_retrieval_recall@5"], outcome.metrics["text_retrieval_recall@5"]
    assert outcome.score == pytest.approx(np.mean(both))
    interval = bootstrap_interval({"pairs": outcome}, num_resamples=200)
    assert interval.low < outcome.score < interval.high


def with_hits(hits: np.ndarray, weights: np.ndarray, image: np.ndarray | None) -> Outcome:
    score, places = float(np.average(hits, weights=weights)), np.zeros(len(hits), np.int64)
    main = "mean_recall@1"
    return Outcome(
        metrics={main: score}, main=main, hits=hits, prediction=places, rank=places, weights=weights, image=image
    )


def some_hits(draw: np.random.Generator, num_images: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, weights and images of samples as `retrieve` orders them: an image is hard or easy for all of its."""
    ease = draw.normal(size=num_images) * 2
    of_text = np.repeat(np.arange(num_images), draw.integers(1, 8, num_images))
    image = np.concatenate([of_text, np.arange(num_images)])
    hits = (ease[image] + draw.normal(size=len(image)) > 0).astype(np.float64)
    weights = np.repeat([0.5 / len(of_text), 0.5 / num_images], [len(of_text), num_images])
    return hits, weights, image


@pytest.mark.parametrize("at_once", [True, False])
def test_interval_draws_images_with_all_their_samples(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop that really draws images, counts their texts and takes both recalls anew."""
    if not at_once:
        monkeypatch.setattr("modeclip.evaluation.intervals.DRAWN_NUMBERS", 30_000)
    draw = np.random.default_rng(3)
    hits, weights, image = some_hits(draw)
    outcome = with_hits(hits, weights, image)
    interval = bootstrap_interval([outcome])
    count = len(hits) - 60
    texts = [np.flatnonzero(image[:count] == number) for number in range(60)]
    means = []
    for _ in range(4000):
        chosen = draw.integers(60, size=60)
        of_texts = hits[np.concatenate([texts[number] for number in chosen])].mean()
        means.append((of_texts + hits[count + chosen].mean()) / 2)
    assert interval.mean == outcome.score
    assert [interval.low, interval.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.012)
    alone = bootstrap_interval([with_hits(hits, weights, None)])
    assert alone.high - alone.low < 0.75 * (interval.high - interval.low)


def test_intervals_of_retrieval_cover_the_truth() -> None:
    """95 % intervals of many small test sets hold what endless images would give, one half, about 95 times of 100."""
    draw = np.random.default_rng(0)
    inside = {"images": 0, "samples": 0}
    for _ in range(300):
        hits, weights, image = some_hits(draw)
        for way, given in (("images", image), ("samples", None)):
            interval = bootstrap_interval([with_hits(hits, weights, given)], num_resamples=400)
            inside[way] += interval.low <= 0.5 <= interval.high
    assert 0.9 < inside["images"] / 300 < 0.99
    assert inside["samples"] / 300 < 0.85, "texts of an image are no samples of their own"


def test_paired_test_counts_images() -> None:
    """The first model is right on four texts more of image 0, the second on one more of images 1 and 2."""
    image = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3])
    first = np.array([1, 1, 1, 1, 1, 0, 0, 0, 1.0])
    second = np.array([0, 0, 0, 0, 1, 1, 1, 0, 1.0])
    one, other = (with_hits(hits, np.ones(9), image) for hits in (first, second))
    assert paired_test([one], [other]) == PairedTest(only_first=1, only_second=2, p_value=1.0)
    assert paired_interval([one], [other]).mean == pytest.approx(2 / 9)


def test_fewer_candidates_than_answers_looked_at() -> None:
    three = np.eye(3, dtype=np.float32)
    similarity = Similarity(images=[three], texts=[three[[0, 0]]], weights=np.ones(1))
    outcome = retrieve(similarity, np.array([1, 2]), (10,))
    assert outcome.metrics["image_retrieval_recall@10"] == outcome.metrics["text_retrieval_recall@10"] == 1
    assert outcome.score == np.average(outcome.hits, weights=outcome.weights)


@pytest.mark.parametrize(
    ("image_of_text", "ks", "message"),
    [
        ([0, 1], (1,), "image of each text.*got 2 for 3"),
        ([0, 1, 4], (1,), "expected images 0 to 1, got 0 to 4"),
        ([0, 1, -1], (1,), "expected images 0 to 1, got -1 to 1"),
        ([0, 1, 1], (), "expected every k to be 1 or more"),
        ([0, 1, 1], (0,), "expected every k to be 1 or more"),
    ],
)
def test_pairs_that_point_nowhere_are_one_line(image_of_text: list[int], ks: tuple[int, ...], message: str) -> None:
    two = np.eye(2, dtype=np.float32)
    similarity = Similarity(images=[two], texts=[two[[0, 1, 1]]], weights=np.ones(1))
    with pytest.raises(ModeclipError, match=message):
        retrieve(similarity, np.array(image_of_text), ks)


@pytest.mark.parametrize("damaged", ["images", "texts"])
def test_a_diverged_model_finds_nothing(damaged: str) -> None:
    sides = {"images": np.eye(3, dtype=np.float32), "texts": np.eye(3, dtype=np.float32)[:2]}
    sides[damaged] = sides[damaged].copy()
    sides[damaged][-1] = np.nan
    similarity = Similarity(images=[sides["images"]], texts=[sides["texts"]], weights=np.ones(1))
    with pytest.raises(ModeclipError, match="hold NaN"):
        retrieve(similarity, np.array([0, 1]))


def test_two_similarities_of_other_sizes_are_refused() -> None:
    one, other = (Similarity(images=[np.eye(n, dtype=np.float32)] * 1, texts=[np.eye(n, dtype=np.float32)],
                             weights=np.ones(1)) for n in (2, 3))  # fmt: skip
    with pytest.raises(ModeclipError, match=r"same images and texts \(2, 2\).*got \(3, 3\)"):
        retrieve(one, np.array([0, 1]), to_texts=other)


def test_memory_is_a_block_however_many_texts() -> None:
    """100,000 texts and 2,000 images are 800 MB as one matrix; here they cost 100 MB beside the features at most."""
    program = """
import resource, numpy as np
from modeclip.evaluation.retrieval import retrieve
from modeclip.evaluation.similarity import Similarity
draw = np.random.default_rng(0)
images, texts = (draw.normal(size=(n, 2)).astype(np.float32) for n in (2_000, 100_000))
pairs = Similarity(images=[images], texts=[texts], weights=np.ones(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieve(pairs, np.arange(100_000) // 50)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
