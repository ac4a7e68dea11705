"""The plan of a pilot: what fits into the minutes, seeds first, then towers; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modeclip.data.catalog import Catalog
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError
from modeclip.models.flops import Flops
from modeclip.pipeline import pilot_plan
from modeclip.pipeline.pilot_plan import PASSES, PilotConfig, PilotPlan, _Speed, plan_pilot

DATA = DataConfig(source="icons")
SIZES = {"modeclip-icon-xxxs": 1, "modeclip-icon-xxs": 2, "modeclip-icon-xs": 6, "modeclip-icon": 20}


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, icons_catalog: Path) -> Callable[..., PilotPlan]:
    """Plan for a few hundred icons; a step of the smallest towers takes 10 ms, a process 2 s."""

    def flops(model: str, _: int, trainable: str) -> Flops:
        size = SIZES[model] * (1 if trainable == "all" else 0.5)
        return Flops(image=int(1000 * size), text=0, backward=int(2000 * size))

    def measure(_: Catalog, plan: PilotPlan) -> _Speed:
        return _Speed(step=0.01 * SIZES[plan.model], start=2.0)

    monkeypatch.setattr(pilot_plan, "_flops", flops)
    monkeypatch.setattr(pilot_plan, "_measure", measure)
    catalog = Catalog.open(icons_catalog)
    return lambda **settings: plan_pilot(catalog, 100, DATA, PilotConfig(**settings), spent=0.0)


def test_more_minutes_give_more_seeds_then_larger_towers(plan: Callable[..., PilotPlan]) -> None:
    plans = {minutes: plan(minutes=minutes) for minutes in (1.5, 3.0, 5.0, 12.0, 200.0)}
    seeds = [found.seeds for found in plans.values()]
    assert seeds == sorted(seeds)
    assert seeds[0] < seeds[-1] == 3
    of_three = [SIZES[found.model] for found in plans.values() if found.seeds == 3]
    assert of_three == sorted(of_three)
    assert plans[200.0].model == "modeclip-icon"
    for minutes, found in plans.items():
        assert found.seconds is not None
        assert 0.5 * 60 * minutes < found.seconds <= 60 * minutes
        assert found.samples % (2 * found.batch_size) == 0
        assert found.passes >= PASSES or found.seeds == 1


def test_what_the_user_gives_is_kept(plan: Callable[..., PilotPlan]) -> None:
    found = plan(minutes=200.0, model="modeclip-icon-xxs", seeds=2, batch_size=32)
    assert (found.model, found.seeds, found.batch_size) == ("modeclip-icon-xxs", 2, 32)
    found = plan(minutes=1.0, model="modeclip-icon-xxs", seeds=5, samples=1000, batch_size=16)
    assert (found.seeds, found.samples, found.seconds) == (5, 992, None)


def test_too_few_minutes_are_refused_with_how_many_would_do(plan: Callable[..., PilotPlan]) -> None:
    with pytest.raises(
        ModeclipError, match=r"--minutes 0.3 is too little.*at least 96; give at least (\d+) minutes"
    ) as e:
        plan(minutes=0.3)
    needed = float(str(e.value).split("give at least ")[1].split()[0])
    assert plan(minutes=needed).seeds >= 1


def test_too_few_pairs_are_refused(icons_catalog: Path) -> None:
    catalog = Catalog.open(icons_catalog)
    with pytest.raises(ModeclipError, match=r"at least 96 pairs.*got .* and 49; give more pairs"):
        plan_pilot(catalog, 49, DATA, PilotConfig(), spent=0.0)
    with pytest.raises(ModeclipError, match=r"at least 24,000 pairs.*fewer --experts"):
        plan_pilot(catalog, 500, DATA, PilotConfig(num_experts=1000), spent=0.0)


def test_experts_that_share_a_trunk_run_it_once() -> None:
    found = PilotPlan(
        model="modeclip-icon",
        num_pairs=1000,
        num_held=100,
        batch_size=64,
        samples=6400,
        seeds=1,
        num_experts=4,
        ways=("dense", "captions", "images", "trunk"),
        caption_length=8,
        seconds=None,
    )
    towers = {way.name: way.towers for way in found.rows()}
    # four image blocks: three are shared, and there is the last one of the seed model, which routes, and of each expert
    assert towers == {"dense": 1, "captions": 4, "images": 5, "trunk": 2}
