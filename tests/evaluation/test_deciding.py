"""The verdict of a pilot: its rule on made-up answers whose gains and scatter are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from modeclip.errors import ModeclipError
from modeclip.evaluation.deciding import (
    DENSE,
    Verdict,
    Way,
    average_gains,
    caution,
    decide,
    gains_of,
    mean_outcome,
    recall_outcome,
)
from modeclip.evaluation.frontier import image_experts_pay_from, outlook
from modeclip.evaluation.intervals import Interval, Outcome

WAYS = (
    Way(name=DENSE, title="one dense model"),
    Way(name="captions", title="4 experts on clusters of captions", towers=4.0),
    Way(name="images", title="4 experts on clusters of images", towers=5.0),
)


def outcome(score: float, count: int = 1000) -> Outcome:
    """Answers of which this share is right, the first ones."""
    hits = (np.arange(count) < round(score * count)).astype(np.float64)
    nothing = np.zeros(count, np.int64)
    return Outcome(metrics={"acc1": float(hits.mean())}, main="acc1", hits=hits, prediction=nothing, rank=nothing)


def gain(mean: float, half: float) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half)


def told(captions: Interval, images: Interval, *, seeds: int = 3, dense: float = 0.3, chance: float = 0.01) -> Verdict:
    answers = [outcome(dense)] * seeds
    return decide(WAYS, {"captions": captions, "images": images}, answers, chance=chance, measure="of accuracy")


def test_the_largest_certain_gain_is_the_answer() -> None:
    verdict = told(gain(0.01, 0.005), gain(0.023, 0.005))
    assert (verdict.choice, verdict.certainty) == ("images", "sure")
    assert verdict.sentence.startswith("Train 4 experts on clusters of images: +2.3 points (+1.8 to +2.8) of accuracy")
    assert "3 seeds" in verdict.sentence
    assert "gains too: 4 experts on clusters of captions" in verdict.sentence
    assert "5 image towers" in verdict.sentence
    # a larger gain that may be chance is no answer
    assert told(gain(0.05, 0.06), gain(0.01, 0.005)).choice == "images"


def test_one_seed_is_never_sure() -> None:
    verdict = told(gain(-0.02, 0.01), gain(0.023, 0.005), seeds=1)
    assert (verdict.choice, verdict.certainty) == ("images", "likely")
    assert "one seed" in verdict.sentence


def test_the_dense_model_is_the_answer_only_if_all_others_lose() -> None:
    verdict = told(gain(-0.03, 0.01), gain(-0.02, 0.01))
    assert (verdict.choice, verdict.certainty) == (DENSE, "sure")
    assert "images least with \N{MINUS SIGN}2.0" in verdict.sentence
    verdict = told(gain(-0.03, 0.01), gain(-0.02, 0.021))
    assert (verdict.choice, verdict.certainty) == (None, "open")
    assert "losses: 4 experts on clusters of captions" in verdict.sentence


def test_what_nobody_can_tell_is_said_with_what_would_have_gone_unseen() -> None:
    verdict = told(gain(0.01, 0.011), gain(-0.01, 0.05))
    assert (verdict.choice, verdict.certainty) == (None, "open")
    assert "Nothing can be told" in verdict.sentence
    assert "up to 4.0 points" in verdict.sentence
    assert "Nearest to it: 4 experts on clusters of captions, +1.0 points" in verdict.sentence
    assert "train one dense model" in verdict.sentence


def test_a_dense_model_that_guesses_decides_nothing() -> None:
    # 30 of 1,000 right: the interval reaches from about 2.0 to 4.1 %
    assert told(gain(0.05, 0.01), gain(0.02, 0.01), dense=0.03, chance=0.025).choice is None
    assert told(gain(0.05, 0.01), gain(0.02, 0.01), dense=0.03, chance=0.01).choice == "captions"


def test_a_gain_over_several_tasks_is_one_of_their_plain_means() -> None:
    """A task of ten images counts as much as one of a thousand; the seeds' scatter is that of the means."""
    dense = [{"large": outcome(0.3), "small": outcome(0.5, 10)}, {"large": outcome(0.3), "small": outcome(0.5, 10)}]
    own = [{"large": outcome(0.32), "small": outcome(0.7, 10)}, {"large": outcome(0.36), "small": outcome(0.7, 10)}]
    found = average_gains({DENSE: dense, "captions": own})["captions"]
    assert found.mean == pytest.approx((0.04 + 0.2) / 2)
    # gains of 0.11 and 0.13: half of their difference, squared, twice over one degree of freedom
    half = t.ppf(0.975, 1) * math.sqrt(2 * (4 * 0.005**2) / 1 / 2)
    assert found.low < found.mean - half < found.mean + half < found.high
    alone = gains_of({DENSE: [each["large"] for each in dense], "captions": [each["large"] for each in own]})
    assert alone == average_gains(
        {way: [{"any": each["large"]} for each in tasks] for way, tasks in {DENSE: dense, "captions": own}.items()}
    )


def test_what_a_way_does_with_all_other_names_is_said_as_surely_as_it_is_known() -> None:
    loses = "loses, \N{MINUS SIGN}9.0 points (\N{MINUS SIGN}10.0 to \N{MINUS SIGN}8.0)"
    chosen, other = (caution(WAYS[1], gain(-0.09, 0.01), choice) for choice in ("captions", None))
    assert chosen.startswith("Ask it about these names alone")
    assert other.startswith("Where all names are asked, 4 experts")
    assert loses in chosen
    assert loses in other
    assert "is not told from the dense model" in caution(WAYS[1], gain(-0.09, 0.1), None)
    assert "gains too" in caution(WAYS[1], gain(0.09, 0.01), "captions")


def test_intervals_of_one_seed_are_those_of_the_images_alone() -> None:
    found = gains_of({DENSE: [outcome(0.3)], "captions": [outcome(0.33)], "images": [outcome(0.3)]})
    # 30 of 1,000 answers turn right: standard error sqrt(0.03 * 0.97 / 1000), at 97.5 % for two ways
    half = 2.2414 * math.sqrt(0.03 * 0.97 / 1000)
    assert found["captions"].mean == pytest.approx(0.03)
    assert found["captions"].low == pytest.approx(0.03 - half, abs=0.0015)
    assert found["captions"].high == pytest.approx(0.03 + half, abs=0.0015)
    assert (found["images"].low, found["images"].high) == (0, 0)


def test_the_scatter_over_seeds_is_one_for_all_ways_and_adds_up_as_squares() -> None:
    # the dense model is the same in each seed; each way has the same answers but for a scatter of its score
    scores = {DENSE: [0.3, 0.3, 0.3], "captions": [0.30, 0.31, 0.32], "images": [0.33, 0.32, 0.31]}
    found = gains_of({name: [outcome(score, 10_000) for score in own] for name, own in scores.items()})
    table = np.array(list(scores.values()))
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    error = math.sqrt(2 * (left**2).sum() / 4 / 3)  # (3 - 1) * (3 - 1) degrees of freedom
    half = float(t.ppf(1 - 0.05 / 2 / 2, 4)) * error
    images = 2.2414 * np.std(outcome(0.3, 10_000).hits - mean_of(scores["images"])) / 100
    assert found["images"].mean == pytest.approx(0.02)
    assert found["images"].high - 0.02 == pytest.approx(math.hypot(half, images), rel=0.03)
    # equal seeds add nothing
    same = gains_of({DENSE: [outcome(0.3)] * 3, "images": [outcome(0.32)] * 3})
    assert same["images"] == gains_of({DENSE: [outcome(0.3)], "images": [outcome(0.32)]})["images"]


def mean_of(scores: list[float]) -> np.ndarray:
    return mean_outcome([outcome(score, 10_000) for score in scores]).hits


def test_few_answers_that_differ_decide_nothing() -> None:
    for more, is_told in ((19, False), (20, True)):
        found = gains_of({DENSE: [outcome(0.3)], "images": [outcome(0.3 + more / 1000)]})["images"]
        assert (found.low > 0) == is_told
        lost = gains_of({DENSE: [outcome(0.3)], "images": [outcome(0.3 - more / 1000)]})["images"]
        assert (lost.high < 0) == is_told


def test_recall_is_the_mean_of_r1_and_r5_both_ways() -> None:
    ranks = np.array([0, 3, 7, 0])  # two texts, then two images
    raw = Outcome(
        metrics={"mean_recall@1": 0.5},
        main="mean_recall@1",
        hits=(ranks == 0).astype(np.float64),
        prediction=ranks,
        rank=ranks,
        weights=np.ones(4),
        image=np.array([0, 1, 0, 1]),
    )
    found = recall_outcome(raw)
    assert found.hits.tolist() == [1, 0.5, 0, 1]
    assert found.score == pytest.approx(0.625)


def test_ways_of_other_seeds_are_refused() -> None:
    with pytest.raises(ModeclipError, match="same seeds"):
        gains_of({DENSE: [outcome(0.3)] * 2, "images": [outcome(0.3)]})
    with pytest.raises(ModeclipError, match="dense"):
        gains_of({"images": [outcome(0.3)]})


@pytest.mark.parametrize(
    ("samples", "flops", "words"),
    [
        (131_072, 17_132_544, "from about 3,300,000 samples on with towers of this size"),
        (131_072, 17_132_544, "25 times shorter"),
        (2_000_000, 1_000_000, "not for want of length"),
    ],
)
def test_outlook_says_how_far_a_trial_is_from_where_experts_of_images_gained(
    samples: int, flops: int, words: str
) -> None:
    assert words in outlook(samples, flops)
    assert (samples >= image_experts_pay_from(flops)) == ("as long as this one" in outlook(samples, flops))
