"""What is said of a clustering, against counting by brute force and refitting."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from modeclip.clustering.cards import Tally, make_cards
from modeclip.clustering.diagnostics import (
    DiagnoseConfig,
    Diagnostics,
    SeedPair,
    Stability,
    measure_stability,
    sweep_experts,
    sweep_fine,
)
from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.fitting import ClusterConfig, ClusterResult, fit_embeddings, imbalance_of
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.negatives import Estimate, NegativeReport, Negatives, identical_share, measure_negatives
from modeclip.errors import ModeclipError
from support import unit_rows

CONFIG = ClusterConfig(num_fine=12, num_experts=3)


def make_data(num_rows: int = 240, num_captions: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around a few directions, with repeated captions; and the caption of each row."""
    random = np.random.default_rng(0)
    directions = random.normal(size=(6, 16))
    vectors = directions[random.integers(6, size=num_captions)] + 0.55 * random.normal(size=(num_captions, 16))
    captions = np.sort(random.integers(num_captions, size=num_rows))
    x = vectors[captions] / np.linalg.norm(vectors[captions], axis=1, keepdims=True)
    return x.astype(np.float32), captions


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    return make_data()


@pytest.fixture(scope="module")
def result(data: tuple[np.ndarray, np.ndarray]) -> ClusterResult:
    x, captions = data
    clustering = fit_embeddings(x, CONFIG)
    fine, squared = assign_nearest(x, clustering.fine_centers)
    tally = Tally(12, np.arange(len(x)))
    tally.add(fine, np.sqrt(squared), captions.astype(str).astype(object))
    cards, experts = make_cards(tally, clustering.experts_of_fine, clustering.range_of_expert)
    imbalance = imbalance_of([card.size for card in experts])
    return ClusterResult(clustering=clustering, fine=cards, experts=experts, imbalance=imbalance, objective=0.0)


# sweeps


@pytest.mark.parametrize("overlap", [1, 2])
def test_sweep_of_experts_equals_refits(
    overlap: int, data: tuple[np.ndarray, np.ndarray], result: ClusterResult
) -> None:
    x, _ = data
    config = replace(CONFIG, overlap=overlap)
    trials = sweep_experts(result, [1, 2, 3, 5, 12], config)
    assert [trial.num_experts for trial in trials] == [1, 2, 3, 5, 12]
    for trial in trials:
        number = trial.num_experts
        again = fit_embeddings(x, replace(config, num_experts=number, overlap=min(overlap, number)))
        rows = np.zeros(number, int)
        squares, ranges = [], [[] for _ in range(number)]
        for fine in assign_nearest(x, again.fine_centers)[0]:
            for expert in again.experts_of_fine[fine]:
                rows[expert] += 1
        for fine in range(12):
            expert = again.experts_of_fine[fine, 0]
            squares.append(((again.fine_centers[fine] - again.coarse_centers[expert]) ** 2).sum())
            ranges[expert].append(math.sqrt(squares[-1]))
        assert trial.imbalance == pytest.approx(rows.max() / rows.mean())
        assert trial.smallest == rows.min()
        assert trial.objective == pytest.approx(np.mean(squares), rel=1e-5, abs=1e-9)
        assert trial.mean_range == pytest.approx(np.mean([np.mean(part) for part in ranges]), rel=1e-5, abs=1e-6)
    assert trials[2].imbalance == pytest.approx(result.imbalance) or overlap == 2
    assert trials[-1].objective == 0


def test_sweep_of_fine_clusters_equals_k_means(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, _ = data
    for trial in sweep_fine(x, (1, 7, 40), CONFIG):
        centers = kmeans(x, trial.num_fine, max_size_ratio=1.5).centers
        squares = np.square(x[:, None].astype(float) - centers).sum(2)
        sizes = np.bincount(squares.argmin(1), minlength=trial.num_fine)
        assert trial.objective == pytest.approx(squares.min(1).mean(), rel=1e-5)
        assert trial.imbalance == pytest.approx(sizes.max() / sizes.mean())
        assert trial.num_empty == (sizes == 0).sum()
        assert trial.seconds > 0


# stability


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index, pair by pair (Hubert and Arabie 1985)."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a, in_b = sum(a[i] == a[j] for i, j in pairs), sum(b[i] == b[j] for i, j in pairs)
    by_chance = in_a * in_b / len(pairs)
    return (both - by_chance) / ((in_a + in_b) / 2 - by_chance)


def test_stability_by_hand(data: tuple[np.ndarray, np.ndarray]) -> None:
    x = data[0][::8]
    stability = measure_stability(x, 3, CONFIG)
    assert [pair.seeds for pair in stability.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in stability.pairs:
        labels = []
        for seed in pair.seeds:
            clustering = fit_embeddings(x, replace(CONFIG, seed=seed))
            fine = assign_nearest(x, clustering.fine_centers)[0]
            labels.append((fine, clustering.expert_of_fine[fine]))
        assert pair.fine == pytest.approx(rand_index(labels[0][0], labels[1][0]))
        assert pair.experts == pytest.approx(rand_index(labels[0][1], labels[1][1]))
    assert stability.fine[0] == pytest.approx(np.mean([pair.fine for pair in stability.pairs]))
    assert stability.experts[1] == pytest.approx(np.std([pair.experts for pair in stability.pairs], ddof=1))


def test_well_separated_clusters_are_found_by_every_seed() -> None:
    centers = 10 * np.eye(4, 8)
    x = (np.repeat(centers, 10, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(40, 8))).astype(np.float32)
    stability = measure_stability(x, 2, ClusterConfig(num_fine=4, num_experts=4))
    assert stability.pairs == (SeedPair(seeds=(0, 1), fine=1.0, experts=1.0),)
    assert stability.fine == (1.0, 0.0)


# negatives


def brute_force(
    x: np.ndarray, captions: np.ndarray, groups: list[np.ndarray], threshold: float
) -> tuple[float, float, float]:
    """Expected share of identical and of false negatives, and mean cosine of the others, over all pairs of a group."""
    total = sum(len(rows) for rows in groups)
    identical = false = cosine = 0.0
    for rows in groups:
        pairs = list(itertools.permutations(rows.tolist(), 2))
        same = [captions[i] == captions[j] for i, j in pairs]
        values = [float(x[i] @ x[j]) for i, j in pairs]
        wrong = [equal or value >= threshold for equal, value in zip(same, values, strict=True)]
        others = [value for value, is_wrong in zip(values, wrong, strict=True) if not is_wrong]
        weight = len(rows) / total
        identical += weight * np.mean(same)
        false += weight * np.mean(wrong)
        cosine += weight * np.mean(others) if others else 0
    return identical, false, cosine


@pytest.mark.parametrize("overlap", [1, 2])
def test_negatives_against_all_pairs(overlap: int, data: tuple[np.ndarray, np.ndarray]) -> None:
    x, captions = data
    clustering = fit_embeddings(x, replace(CONFIG, overlap=overlap))
    fine = assign_nearest(x, clustering.fine_centers)[0]
    experts = clustering.experts_of_fine[fine]
    report = measure_negatives(
        lambda rows: x[rows].astype(np.float16), captions, fine, experts, batch_size=10, num_batches=2000, threshold=0.9
    )
    groups = {
        "random": [np.arange(len(x))],
        "expert": [np.flatnonzero([k in row for row in experts.tolist()]) for k in range(3)],
        "fine": [np.flatnonzero(fine == s) for s in np.unique(fine)],
    }
    assert [kind.kind for kind in report.kinds] == list(groups)
    for kind in report.kinds:
        identical, false, cosine = brute_force(x, captions, groups[kind.kind], 0.9)
        assert kind.identical == pytest.approx(identical)
        assert kind.false.mean == pytest.approx(false, abs=4.5 * kind.false.standard_error)
        assert kind.false.standard_error < 0.1 * false
        assert kind.identical <= kind.false.interval[0] <= kind.false.mean
        if kind.kind != "fine":  # whole batches
            assert kind.mean_batch_size == 10
            assert kind.false_per_pair.mean == pytest.approx(9 * kind.false.mean)
            assert kind.cosine.mean == pytest.approx(cosine, abs=4.5 * kind.cosine.standard_error + 2e-3)
    pairs = [
        (i, j) for i, j in itertools.permutations(range(len(x)), 2) if captions[i] == captions[j] or x[i] @ x[j] >= 0.9
    ]
    apart = np.mean([not set(experts[i]) & set(experts[j]) for i, j in pairs])
    assert report.apart == pytest.approx(apart, abs=0.02)
    assert report.num_false == pytest.approx(2000 * 10 * report.kinds[0].false_per_pair.mean, rel=0.1)


def test_whole_groups_are_counted_exactly() -> None:
    x = np.array([[1, 0], [1, 0], [0.8, 0.6], [0, 1], [-1, 0], [-1, 0]], np.float32)
    captions, fine = np.array([5, 5, 6, 7, 8, 9]), np.array([0, 0, 0, 0, 1, 1])
    report = measure_negatives(
        lambda rows: x[rows], captions, fine, fine[:, None], batch_size=6, num_batches=4, threshold=0.7
    )
    random = report.kinds[0]
    assert (random.identical, random.mean_batch_size) == (pytest.approx(2 / 30), 6.0)
    assert random.false.mean == pytest.approx(8 / 30)  # 0-1, 0-2, 1-2, 4-5
    assert random.false.standard_error == pytest.approx(0, abs=1e-9)
    assert random.false_per_pair.mean == pytest.approx(8 / 6)
    others = [x[i] @ x[j] for i, j in itertools.combinations(range(6), 2)]
    assert random.cosine.mean == pytest.approx(sum(value for value in others if value < 0.7) / 11)
    assert report.apart == 0
    half = np.array([0, 1, 1, 1, 0, 0])
    split = measure_negatives(
        lambda rows: x[rows], captions, fine, half[:, None], batch_size=6, num_batches=4, threshold=0.7
    )
    assert (split.num_false, split.apart) == (32, 0.5)  # 0-1 and 0-2 are apart


def test_identical_captions_are_false_whatever_their_embeddings() -> None:
    x, fine = np.eye(3, dtype=np.float32), np.zeros(3, np.int64)
    report = measure_negatives(lambda rows: x[rows], np.array([4, 4, 5]), fine, fine[:, None], batch_size=3)
    assert report.kinds[0].false.mean == pytest.approx(report.kinds[0].identical) == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_false_negatives_are_never_fewer_than_identical_ones(seed: int) -> None:
    """Few batches of few rows meet none of the captions that are rare twins, which are counted all the same."""
    x = unit_rows(400, 64, seed)
    captions = np.arange(400)
    captions[1:20:2] = captions[0:20:2]
    fine = np.arange(400) // 20
    report = measure_negatives(
        lambda rows: x[rows], captions, fine, fine[:, None] % 2, batch_size=8, num_batches=3, threshold=0.95, seed=seed
    )
    random, _, clusters = report.kinds
    assert random.identical == pytest.approx(20 / (400 * 399))
    assert clusters.identical == pytest.approx(20 / 400 * 1 / 19)  # all twins are in the first of 20 clusters
    assert random.false_per_pair.mean == pytest.approx(7 * random.identical)
    assert clusters.false_per_pair.mean == pytest.approx(7 * clusters.identical)
    for kind in report.kinds:
        assert kind.false.mean == pytest.approx(kind.identical)  # no others are so near
        assert kind.identical <= kind.false.interval[0] <= kind.false.mean <= kind.false.interval[1]


def test_identical_share_by_counting() -> None:
    captions = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    groups = [np.array([0, 1, 3, 5]), np.array([2, 4, 6, 7])]
    assert identical_share(captions, groups) == pytest.approx(brute_force(np.eye(8), captions, groups, 2)[0])


def test_blocks_of_a_large_batch_do_not_matter(
    data: tuple[np.ndarray, np.ndarray], result: ClusterResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, captions = data
    fine = assign_nearest(x, result.clustering.fine_centers)[0]

    def measure() -> NegativeReport:
        return measure_negatives(
            lambda rows: x[rows], captions, fine, result.clustering.experts_of_fine[fine], batch_size=100, num_batches=5
        )

    whole = measure()
    monkeypatch.setattr("modeclip.clustering.negatives.ROWS_AT_ONCE", 7)
    parts = measure()
    for kind, other in zip(whole.kinds, parts.kinds, strict=True):
        assert (kind.false, kind.identical) == (other.false, other.identical)
        assert kind.cosine.mean == pytest.approx(other.cosine.mean, abs=1e-6)
    assert whole.apart == parts.apart


def make_report(random: float, expert: float, cosines: tuple[float, float], num_false: int = 10) -> NegativeReport:
    kinds = [
        Negatives(
            kind=kind,
            mean_batch_size=256.0,
            identical=0.0,
            false=Estimate(mean=share, standard_error=0.001),
            false_per_pair=Estimate(mean=255 * share, standard_error=0.1),
            cosine=Estimate(mean=cosine, standard_error=0.001),
        )
        for kind, share, cosine in zip(
            ("random", "expert", "fine"), (random, expert, expert), (*cosines, 0.5), strict=True
        )
    ]
    return NegativeReport(
        batch_size=256, num_batches=9, threshold=0.9, num_rows=99, kinds=tuple(kinds), num_false=num_false, apart=0.25
    )


def test_the_verdict_says_what_was_measured() -> None:
    more = make_report(0.01, 0.025, (0.1, 0.2)).verdict
    assert "one expert, 2.5 % (95 %: 2.3 to 2.7) of the negatives are false" in more
    assert "in random batches 1 % (95 %: 0.804 to 1.2): 2.5 times as many; the other negatives are harder" in more
    assert more.endswith(
        "25.0 % of the false negatives of random batches join two experts and cannot meet in a batch of one."
    )
    fewer = make_report(0.03, 0.01, (0.3, 0.2), num_false=0).verdict
    assert ": fewer; the other negatives are easier" in fewer
    assert fewer.endswith("random batches had no false negative.")
    assert (
        ": no clear difference; the other negatives are about as hard" in make_report(0.01, 0.011, (0.2, 0.2)).verdict
    )


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"num_batches": 0}, {"threshold": 0.0}, {"threshold": 1.5}])
def test_mistakes_in_the_numbers(changes: dict[str, float]) -> None:
    fine = np.zeros(4, np.int64)
    with pytest.raises(ModeclipError, match=r"^negatives.*2 pairs or more.*\(0, 1\].*got "):
        measure_negatives(lambda rows: np.ones((len(rows), 2)), fine, fine, fine[:, None], **changes)  # type: ignore[arg-type]


def test_nothing_to_compare() -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ModeclipError, match="expected 2 rows or more, got 1"):
        measure_negatives(lambda rows: np.ones((len(rows), 2)), one, one, one[:, None])
    rows = np.arange(3)
    with pytest.raises(ModeclipError, match=r"kind expert.*single row.*fewer clusters"):
        measure_negatives(lambda rows: np.ones((len(rows), 2)), rows, rows, rows[:, None])


# all of it


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_seeds": 1}, r"diagnose\.num_seeds.*2 or more.*got 1"),
        ({"experts": (2, 0)}, r"diagnose.*1 or more.*got \[2, 0\]"),
        ({"batch_size": 1}, r"diagnose\.batch_size.*2 or more.*got 1"),
        ({"threshold": 0.0}, r"diagnose\.threshold.*\(0, 1\].*got 0\.0"),
    ],
)
def test_mistakes_in_the_config(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError, match=f"^{message}$"):
        DiagnoseConfig(**fields)  # type: ignore[arg-type]


def test_nothing_looked_into() -> None:
    assert Diagnostics().tables() == []
    assert DiagnoseConfig(experts=()).experts == ()


def test_spread_of_one_pair_is_none() -> None:
    assert Stability(pairs=(SeedPair(seeds=(0, 1), fine=0.5, experts=0.25),)).experts == (0.25, 0.0)


def test_batches_whose_negatives_are_all_false_have_no_mean_cosine(tmp_path: Path) -> None:
    """Two clusters of equal captions each: in a batch of one, no negative is left to be hard."""
    x = np.repeat(np.eye(2, dtype=np.float32), 4, axis=0)
    label = np.repeat([0, 1], 4)
    report = measure_negatives(lambda rows: x[rows], label, label, label[:, None], batch_size=8, num_batches=3)
    random, expert, fine = report.kinds
    assert random.cosine is not None
    assert random.cosine.mean == 0.0
    assert expert.cosine is None
    assert fine.cosine is None
    assert "nan" not in report.verdict
    assert "mean cosine" not in report.verdict
    found = Diagnostics(negatives=report)
    found.save(tmp_path)
    assert Diagnostics.load(tmp_path) == found
    assert found.tables()[0][2][1][-1] == ""
