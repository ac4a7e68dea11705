"""What a pilot will train: towers, samples and random seeds, so that it ends within its minutes.

A few real steps are measured for the smallest towers, and again for those that are chosen; others are estimated by
their floating-point operations. Seeds come first, since without a second one nothing is sure: the plan takes three
seeds if any towers can then see the pairs `PASSES` times, else two, else one, and of these towers the largest that is
not larger than what fits the pairs. What leaves less than `FEWEST_STEPS` steps for a model is refused.

A schedule is two equal parts. A seed model takes the first, and every way to train goes on from it with what the dense
model's second part costs, less what the way needs besides: so each is a whole training of the same cost in
floating-point operations, and the first half is paid once.

Price: some seconds for each measurement; the plan is kept, so a pilot that goes on measures nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from modeclip.clustering.fitting import sample_rows
from modeclip.data.catalog import Catalog
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError, check_above_zero, check_between, check_least
from modeclip.evaluation.deciding import DENSE, Way
from modeclip.models.blocks import blocks_of
from modeclip.models.clip import load_clip
from modeclip.models.flops import Flops, count_flops
from modeclip.pipeline.run_folder import single_job
from modeclip.training.choosing import LADDER, choose_model
from modeclip.training.jobs import AUTO, MOST_PROCESSES, TrainConfig
from modeclip.training.status import in_words

TOWERS = ("modeclip-icon-xxxs", "modeclip-icon-xxs", "modeclip-icon-xs", *LADDER)
"""Towers to choose from, the smallest first."""
CAPTIONS, IMAGES, TRUNK, NAMES, CURATED = "captions", "images", "trunk", "names", "curated"
LAST = "last:1"
"""What experts that share a trunk change."""
PASSES = 4.0
"""How often a model should see each pair, at least, for one more seed or larger towers."""
FEWEST_STEPS, MOST_SEEDS = 96, 3
"""Fewest steps of the dense model, and most seeds."""
PAIRS_PER_MINUTE, MOST_PAIRS = 2000, 60_000
"""Pairs that are sampled for each minute, and in all."""
FEWEST_PAIRS = 24
"""Fewest pairs to train on for each expert."""
HELD_FRACTION, FEWEST_HELD = 0.2, 50
"""Share of the images that is held out, and the fewest held-out captions, and images of class names."""
FILTER_SHARE = 0.25
"""Share of the cost that a filter of clean pairs takes."""
BESIDE = 1.25
"""How much slower a step is while others train."""
STAGE_SECONDS = 4.0
"""What an embedding with its clustering takes besides the towers' work, and an evaluation for each model a quarter."""


@dataclass(frozen=True, kw_only=True)
class PilotConfig:
    """What a pilot tries, and how long it may take."""

    minutes: float = 30.0
    """How long it may take in all on this machine, above 0. More minutes give more seeds, more pairs and larger
    towers."""
    classes: str | None = None
    """Your class names: a file with one on each line, or 'cat,dog'. They judge every way to train, and one more way is
    an expert for them."""
    clean: str | None = None
    """Pairs that you trust, as a condition on the source's columns (a column of booleans, COLUMN=VALUE, SQL): the
    filter of curated data is trained on them. Default: the seed model itself is the filter."""
    keep_fraction: float = 0.3
    """Share of the pairs that the filter keeps (DFN), in (0, 1]."""
    num_experts: Annotated[int, arg(name="experts")] = 4
    """Experts of each mixture, 2 or more."""
    pairs: int | None = None
    """Pairs that are sampled from the source, the held-out part included; default: 2,000 a minute, at most 60,000."""
    model: str = AUTO
    """Model to train, as for `modeclip train`; ``auto`` takes the largest towers that the minutes allow."""
    batch_size: int | None = None
    """Pairs in a step; default: at most 256, and so few that each expert has four batches."""
    samples: int | None = None
    """Samples of the dense model, whose cost is that of every way; default: what the minutes allow."""
    seeds: int | None = None
    """Random seeds of every way; default: three, if the minutes allow it."""
    jobs: int = 2
    """Models that train at the same time, each with a thread."""
    seed: int = 0
    """Decides the sample, what is held out, and the first random seed."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_above_zero("pilot", self, "minutes")
        check_least("pilot", self, num_experts=2, pairs=1, batch_size=2, samples=1, seeds=1, seed=0)
        check_between("pilot", self, jobs=(1, MOST_PROCESSES))
        if not 0 < self.keep_fraction <= 1:
            raise ModeclipError(f"pilot.keep_fraction: expected a share in (0, 1], got {self.keep_fraction}")

    @property
    def wanted_pairs(self) -> int:
        """Pairs to sample."""
        return self.pairs or min(MOST_PAIRS, max(1, round(PAIRS_PER_MINUTE * self.minutes)))


@dataclass(frozen=True, kw_only=True)
class PilotPlan:
    """What a pilot trains; it is decided once."""

    model: str
    """Towers."""
    num_pairs: int
    """Pairs to train on."""
    num_held: int
    """Held-out pairs with a caption of their own."""
    batch_size: int
    """Pairs in a step."""
    samples: int
    """Samples of the dense model."""
    seeds: int
    """Random seeds."""
    num_experts: int
    """Experts of each mixture."""
    ways: tuple[str, ...]
    """Names of the ways to train."""
    caption_length: int
    """Tokens of the longest caption of a batch."""
    seconds: float | None
    """Estimated time from now on; None where the user gave samples and seeds."""

    @property
    def passes(self) -> float:
        """How often the dense model sees each pair."""
        return self.samples / self.num_pairs

    def flops(self, trainable: str = "all") -> Flops:
        """Return the operations of a sample."""
        return _flops(self.model, self.caption_length, trainable)

    def towers(self) -> dict[str, float]:
        """Return the image towers that a picture goes through with each way.

        Mixtures of images route by the seed model's image tower. Experts that share a trunk run it once for all.
        """
        blocks, count = len(blocks_of(load_clip(self.model.partition("@")[0], seed=0).model)["image"]), self.num_experts
        shared = (blocks + count) / blocks if blocks else count + 1.0
        return {CAPTIONS: float(count), IMAGES: count + 1.0, TRUNK: shared}

    def rows(self) -> list[Way]:
        """Return the ways in the order of their rows."""
        count, towers = self.num_experts, self.towers()
        titles = {
            DENSE: "one dense model",
            CAPTIONS: f"{count} experts on clusters of captions",
            IMAGES: f"{count} experts on clusters of images",
            TRUNK: f"{count} experts of images that share a trunk",
            NAMES: "one expert for your class names",
            CURATED: "one dense model on curated pairs",
        }
        return [Way(name=name, title=titles[name], towers=towers.get(name, 1.0)) for name in self.ways]

    def lines(self) -> list[str]:
        """Return the plan in words."""
        time_left = "" if self.seconds is None else f", about {in_words(self.seconds)} from now on"
        return [
            f"plan: {self.model} on {self.num_pairs:,} pairs, {self.num_held:,} held out; every way costs what one "
            f"dense model of {self.samples:,} samples does ({self.passes:.1f} passes, batches of {self.batch_size})",
            f"plan: {self.seeds} random seed{'s' if self.seeds > 1 else ''} of {len(self.ways)} ways "
            f"({', '.join(self.ways)}), {self.num_experts} experts each{time_left}",
        ]


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """What training takes."""

    step: float
    """Seconds of a step, alone on the machine."""
    start: float
    """Seconds until a process trains."""


def plan_pilot(catalog: Catalog, num_held: int, data: DataConfig, config: PilotConfig, *, spent: float) -> PilotPlan:
    """Choose what a pilot trains.

    Args:
        catalog: The sampled pairs.
        num_held: Held-out pairs with a caption of their own.
        data: Where the pairs come from, for messages.
        config: What the user wants.
        spent: Seconds that it has taken so far.

    Raises:
        ModeclipError: There are too few pairs or too few minutes.
    """
    _check_pairs(len(catalog), num_held, data, config)
    ways = [DENSE, CAPTIONS, IMAGES, TRUNK, *([NAMES] if config.classes else []), CURATED]
    batch = config.batch_size or _batch_size(len(catalog), config.num_experts)
    best = choose_model(catalog).model if config.model == AUTO else config.model
    given = PilotPlan(
        model=best,
        num_pairs=len(catalog),
        num_held=num_held,
        batch_size=batch,
        samples=_rounded(config.samples or 0, batch),
        seeds=config.seeds or 1,
        num_experts=config.num_experts,
        ways=tuple(ways),
        caption_length=_caption_length(catalog, best, batch),
        seconds=None,
    )
    if config.samples and config.seeds and config.model != AUTO:
        return given
    end = time.monotonic() + 60 * config.minutes - spent
    models = [best] if config.model != AUTO else list(TOWERS[: TOWERS.index(best) + 1])
    plans = [replace(given, model=model, caption_length=_caption_length(catalog, model, batch)) for model in models]
    found = _choose(catalog, plans, config, end)
    return found if len(plans) == 1 else _choose(catalog, [found], config, end)


@cache
def _flops(model: str, length: int, trainable: str) -> Flops:
    return count_flops(model, length, trainable=trainable)


def _caption_length(catalog: Catalog, model: str, batch_size: int) -> int:
    """Return the tokens of the longest caption of a batch, as training cuts the padding."""
    captions = catalog.captions(sample_rows(len(catalog), batch_size, 0))
    tokens = load_clip(model if Path(model).exists() else model.partition("@")[0], seed=0).tokens(captions)
    return max(2, int((tokens != 0).any(0).nonzero().max()) + 1)


def _check_pairs(num_pairs: int, num_held: int, data: DataConfig, config: PilotConfig) -> None:
    fewest = FEWEST_PAIRS * config.num_experts
    if num_pairs < fewest or num_held < FEWEST_HELD:
        raise ModeclipError(
            f"pilot of {data.source!r}: expected at least {fewest:,} pairs to train on and {FEWEST_HELD} held-out ones "
            f"with different captions, got {num_pairs:,} and {num_held:,}; give more pairs (--pairs, another source) "
            "or fewer --experts"
        )


def _batch_size(num_pairs: int, num_experts: int) -> int:
    """Return a power of two of which each expert of mean size has four batches.

    Examples:
        >>> _batch_size(8_000, 4), _batch_size(100_000, 4), _batch_size(96, 4)
        (256, 256, 4)
    """
    return int(min(256, max(2, 2 ** math.floor(math.log2(num_pairs / (4 * num_experts))))))


def _rounded(samples: int | float, batch_size: int) -> int:
    """Return whole steps for two equal parts."""
    return max(1, math.floor(samples / (2 * batch_size))) * 2 * batch_size


def _choose(catalog: Catalog, plans: list[PilotPlan], config: PilotConfig, end: float) -> PilotPlan:
    """Return the plan with the most seeds, then the largest towers, that is over at some time.

    Args:
        catalog: The sampled pairs.
        plans: A plan for each of the towers, the smallest first, on which a few steps are measured.
        config: What the user wants.
        end: When the pilot must be over, by the monotonic clock.

    Raises:
        ModeclipError: None is.
    """
    smallest = plans[0]
    measured = _measure(catalog, smallest)
    left, most, fewest_seeds = end - time.monotonic(), 0.0, config.seeds or 1
    for seeds in [config.seeds] if config.seeds else range(MOST_SEEDS, 0, -1):
        for plan in reversed(plans):
            plan = replace(plan, seeds=seeds)
            speed = replace(measured, step=measured.step * plan.flops().training / smallest.flops().training)
            samples = config.samples or _affordable(plan, speed, config.jobs, left)
            steps = samples / plan.batch_size
            most = max(most, steps)
            is_last = seeds == fewest_seeds and plan.model == smallest.model
            if steps >= FEWEST_STEPS and (is_last or samples >= PASSES * plan.num_pairs):
                plan = replace(plan, samples=_rounded(samples, plan.batch_size))
                return replace(plan, seconds=_seconds(plan, speed, config.jobs, plan.samples))
    smallest = replace(smallest, seeds=fewest_seeds)
    needed = _seconds(smallest, measured, config.jobs, FEWEST_STEPS * smallest.batch_size) + 60 * config.minutes - left
    raise ModeclipError(
        f"--minutes {config.minutes:g} is too little: {smallest.model} would take {round(most)} steps, expected at "
        f"least {FEWEST_STEPS}; give at least {math.ceil(1.1 * needed / 60)} minutes, or fewer --experts"
    )


def _measure(catalog: Catalog, plan: PilotPlan) -> _Speed:
    """Train a few steps in a folder that is thrown away."""
    from modeclip.training.costs import MEASURED_STEPS, measure

    train = TrainConfig(model=plan.model, samples=32 * plan.batch_size, batch_size=plan.batch_size)
    started = time.monotonic()
    found = measure(single_job(catalog, Path("measured"), train))
    spent = time.monotonic() - started - MEASURED_STEPS * found.seconds_per_step
    return _Speed(step=found.seconds_per_step, start=max(spent, 0.5))


def _units(plan: PilotPlan) -> float:
    """Return the steps of all models of a seed, in those of its dense model.

    Experts that share a trunk take more steps for the same operations, and on small towers a step is hardly shorter.
    """
    cheaper = plan.flops().training / plan.flops(LAST).training
    return 0.5 + 0.5 * (len(plan.ways) - 1) + 0.5 * cheaper


def _num_models(plan: PilotPlan) -> int:
    return 1 + sum(plan.num_experts if name in {CAPTIONS, IMAGES, TRUNK} else 1 for name in plan.ways)


def _fixed(plan: PilotPlan, speed: _Speed, jobs: int) -> float:
    """Return the seconds of a seed that do not grow with the samples."""
    sample = speed.step / plan.batch_size
    embedding = 3 * STAGE_SECONDS + 0.67 * plan.num_pairs * sample
    evaluation = _num_models(plan) * (STAGE_SECONDS / 4 + plan.num_held * sample / 3)
    return _num_models(plan) * speed.start / jobs + embedding + evaluation


def _affordable(plan: PilotPlan, speed: _Speed, jobs: int, left: float) -> float:
    """Return the samples of a dense model for which all fits into the seconds left."""
    free = left / plan.seeds - _fixed(plan, speed, jobs)
    return max(0.0, free) * jobs * plan.batch_size / (_units(plan) * speed.step * BESIDE)


def _seconds(plan: PilotPlan, speed: _Speed, jobs: int, samples: int | float) -> float:
    """Return what all seeds take with so many samples of a dense model."""
    steps = samples / plan.batch_size
    return plan.seeds * (_fixed(plan, speed, jobs) + _units(plan) * steps * speed.step * BESIDE / jobs)
