"""Decides which of several ways to train is worth its cost against one dense model, and says how sure that is.

Every way has cost the same and was asked the same held-out pairs, with the same random seeds. The rule:

1. A gain is the difference of two scores, averaged over the seeds. Its interval has two parts. One is a bootstrap over
   the held-out images, paired, of the answers averaged over the seeds. The other is Student's t over the seeds, with
   one scatter for all ways (what is left of the scores after the mean of each way and of each seed is taken off), since
   two or three seeds of one way tell little. Both are independent, so their half widths add up as squares.
2. The intervals of all ways hold together with 95 % (Bonferroni: each has 1 - 0.05 / their number), so looking for the
   best one needs no further correction. A way *gains* if its interval lies above 0, and *loses* if it lies below.
   Where fewer than 20 answers differ, an interval is taken to reach 0.
3. If the dense model answers no better than guessing (its own interval reaches down to it), nothing can be told.
4. If ways gain, the one with the largest gain is the answer. If all ways lose, the dense model is. Otherwise nothing
   can be told, and the sentence says how large a gain would have gone unseen.
5. The answer is *sure* with two seeds or more. With one it is at most *likely*: what another seed gives is not known.

Source: intervals as in `modeclip.evaluation.intervals`; one scatter for all is the error of a two-way analysis of
variance (way and seed) without repetition.
Price: one bootstrap for each way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError
from modeclip.evaluation.intervals import CONFIDENCE, Interval, Outcome, average, bootstrap_interval, paired_interval

DENSE = "dense"
"""Name of the way that all others are compared with."""
FEWEST_DIFFERING = 20
"""With fewer answers that differ, a bootstrap is too sure of itself: six answers that all turn right would do."""
OF_NAMES = "of zero-shot accuracy (mean over the names)"
"""The measure of a classification among class names, as the sentence has it."""
RECALL_AT = (1, 5)
"""Numbers of answers that `recall_outcome` looks at."""

Certainty = Literal["sure", "likely", "open"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train, as the sentence names it."""

    name: str
    """Short name; that of the dense model is `DENSE`."""
    title: str
    """What is trained, in words that follow "train"."""
    towers: float = 1.0
    """Image towers that a picture goes through when the model is used."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to train, and how sure that is."""

    choice: str | None
    """Name of the way; None where nothing can be told."""
    certainty: Certainty
    """``sure`` (several seeds), ``likely`` (one), or ``open`` where nothing can be told."""
    sentence: str
    """The same for people."""


def recall_outcome(outcome: Outcome) -> Outcome:
    """Return what a model did in a retrieval task as the mean of R@1 and R@5, texts to images and images to texts."""
    ranks = np.asarray(outcome.rank)
    hits = np.mean([ranks < k for k in RECALL_AT], axis=0)
    score = float(np.average(hits, weights=outcome.weights))
    return replace(outcome, hits=hits, metrics={**outcome.metrics, "mean_recall": score}, main="mean_recall")


def mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Return what several seeds of a model did on the same samples, averaged sample by sample."""
    first = outcomes[0]
    score = float(np.mean([outcome.score for outcome in outcomes]))
    hits = np.mean([outcome.hits for outcome in outcomes], axis=0)
    return replace(first, hits=hits, metrics={first.main: score})


def gains_of(answers: Mapping[str, Sequence[Outcome]], *, confidence: float = CONFIDENCE) -> dict[str, Interval]:
    """Return what each way gains on the dense model; the intervals of all ways hold together.

    Args:
        answers: What each way did on one task, an outcome for each seed in the same order; `DENSE` is one of them.
        confidence: How surely all intervals hold, in (0, 1).

    Raises:
        ModeclipError: The dense model is missing, or ways have other seeds or other samples.
    """
    one_task = {name: [{"held-out": outcome} for outcome in outcomes] for name, outcomes in answers.items()}
    return average_gains(one_task, confidence=confidence)


def average_gains(
    answers: Mapping[str, Sequence[Mapping[str, Outcome]]], *, confidence: float = CONFIDENCE
) -> dict[str, Interval]:
    """Return what each way gains on the dense model in the plain mean over several tasks; see `gains_of`.

    Args:
        answers: What each way did, for each seed an outcome of each task.
        confidence: As in `gains_of`.

    Raises:
        ModeclipError: As in `gains_of`.
    """
    if DENSE not in answers or len({len(outcomes) for outcomes in answers.values()}) != 1:
        raise ModeclipError(f"gains: expected the same seeds of every way and of {DENSE!r}, got {sorted(answers)}")
    others = [name for name in answers if name != DENSE]
    if not others:
        return {}
    level = 1 - (1 - confidence) / len(others)
    scores = np.array([[average(tasks) for tasks in of_seed] for of_seed in answers.values()])
    half, dense = _seed_half_width(scores, level), _mean_outcomes(answers[DENSE])
    gains = {}
    for name in others:
        own = _mean_outcomes(answers[name])
        found = paired_interval(own, dense, confidence=level)
        below, above = (math.hypot(end - found.mean, half) for end in (found.low, found.high))
        low, high = found.mean - below, found.mean + above
        if sum(np.count_nonzero(own[task].hits != dense[task].hits) for task in own) < FEWEST_DIFFERING:
            low, high = min(low, 0.0), max(high, 0.0)
        gains[name] = Interval(mean=found.mean, low=low, high=high)
    return gains


def decide(
    ways: Sequence[Way],
    gains: Mapping[str, Interval],
    dense: Sequence[Outcome],
    *,
    chance: float,
    measure: str,
    remedy: str = "more minutes buy more",
) -> Verdict:
    """Return what to train, by the rule at the top of this module.

    Args:
        ways: The ways in the order of their rows.
        gains: As `gains_of` returns them, in the measure that decides.
        dense: What the dense model did, for each seed.
        chance: What guessing reaches in that measure.
        measure: Its name in the sentence.
        remedy: What would tell more than one seed does.
    """
    title = {way.name: way.title for way in ways}
    own = bootstrap_interval({"held-out": mean_outcome(dense)})
    if own.low <= chance:
        return Verdict(
            choice=None,
            certainty="open",
            sentence=f"Nothing can be told: the dense model itself is at {100 * own.mean:.1f} % {measure}, no surer "
            f"than guessing ({100 * chance:.1f} %); give more minutes, more pairs, or a model that fits them better.",
        )
    certainty: Certainty = "sure" if len(dense) > 1 else "likely"
    basis = (
        f"sure as far as {len(dense)} seeds and these held-out pairs go"
        if len(dense) > 1
        else f"likely, since the held-out pairs say so, but it is one seed and another may differ; {remedy}"
    )
    won = sorted((name for name in gains if gains[name].low > 0), key=lambda name: -gains[name].mean)
    lost = sorted((name for name in gains if gains[name].high < 0), key=lambda name: gains[name].mean)
    if won:
        best = next(way for way in ways if way.name == won[0])
        price = f" A picture goes through {best.towers:.3g} image towers then." if best.towers > 1 else ""
        also = f" Certain gains too: {_names(won[1:], title)}." if won[1:] else ""
        return Verdict(
            choice=best.name,
            certainty=certainty,
            sentence=f"Train {best.title}: {_words(gains[best.name])} {measure} over one dense model of the same cost, "
            f"{basis}.{also}{price}",
        )
    if gains and len(lost) == len(gains):
        return Verdict(
            choice=DENSE,
            certainty=certainty,
            sentence=f"Train {title[DENSE]}: at the same cost every other way loses, {_names(lost[-1:], title)} "
            f"least with {_words(gains[lost[-1]])} {measure}, {basis}.",
        )
    unseen = max((gains[name].high for name in gains if name not in lost), default=0.0)
    first = max(gains, key=lambda name: gains[name].mean, default=DENSE)
    nearest = f" Nearest to it: {title[first]}, {_words(gains[first])}." if gains and gains[first].mean > 0 else ""
    losing = f" Certain losses: {_names(lost, title)}." if lost else ""
    return Verdict(
        choice=None,
        certainty="open",
        sentence=f"Nothing can be told: no way gains more than chance over one dense model of the same cost, and a "
        f"gain of up to {100 * unseen:.1f} points {measure} would have gone unseen. Until more minutes or pairs tell, "
        f"train {title[DENSE]}, the simplest.{nearest}{losing}",
    )


def caution(way: Way, gain: Interval, choice: str | None) -> str:
    """Return a sentence about what a way that is made for some names does with all others.

    Args:
        way: The way.
        gain: What it gains on the dense model where all names are asked.
        choice: Name of the way that the verdict has chosen, if any.
    """
    if gain.high < 0 and choice == way.name:
        return f"Ask it about these names alone: where all names are asked, it loses, {_words(gain)}."
    if gain.high < 0:
        return f"Where all names are asked, {way.title} loses, {_words(gain)}."
    if gain.low > 0:
        return f"Where all names are asked, {way.title} gains too, {_words(gain)}."
    return f"Where all names are asked, {way.title} is not told from the dense model, {_words(gain)}."


def _mean_outcomes(of_seed: Sequence[Mapping[str, Outcome]]) -> dict[str, Outcome]:
    """Return what several seeds of a model did on several tasks, averaged sample by sample."""
    return {task: mean_outcome([tasks[task] for tasks in of_seed]) for task in of_seed[0]}


def _seed_half_width(scores: Float[np.ndarray, "R S"], level: float) -> float:
    """Return the half width that the seeds give to the difference of two ways' means; 0 for one seed."""
    rows, seeds = scores.shape
    if seeds < 2 or rows < 2:
        return 0.0
    from scipy.stats import t

    left = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    degrees = (rows - 1) * (seeds - 1)
    error = math.sqrt(2 * float((left**2).sum()) / degrees / seeds)
    return float(t.ppf((1 + level) / 2, degrees)) * error


def _names(names: Sequence[str], title: Mapping[str, str]) -> str:
    words = [title[name] for name in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _words(gain: Interval) -> str:
    low, high = (f"{100 * end:+.1f}" for end in (gain.low, gain.high))
    return f"{100 * gain.mean:+.1f} points ({low} to {high})".replace("-", "\N{MINUS SIGN}")
