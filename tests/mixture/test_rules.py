"""Routing against plain loops over the paper's formulas, published examples, and invariants."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modeclip.clustering import distances
from modeclip.clustering.distances import nearest_centers
from modeclip.errors import ModeclipError
from modeclip.mixture.rules import (
    DEFAULT_TEMPERATURE,
    RULES,
    Routing,
    embed_classes,
    keep_best,
    route,
)

NUM_CLASSES_AT_THRESHOLDS = [1, 2, 9, 10, 11, 200, 201, 210, 211, 1000]


# --- a task whose distances are what we say ------------------------------------------------------


def make_task(nearest_fine, distance, num_fine):
    """Centres on axes of their own, far apart; each class beside its centre, along one more axis."""
    centers = np.zeros((num_fine, num_fine + 1))
    centers[:, :num_fine] = 100 * np.eye(num_fine)
    classes = centers[np.asarray(nearest_fine)]
    classes[:, -1] = distance
    return classes, centers


def random_task(seed, num_classes, num_fine=7):
    """A task of four experts with random distances; expert 1 has no fine cluster."""
    rng = np.random.default_rng(seed)
    nearest_fine = rng.integers(num_fine, size=num_classes)
    distance = rng.uniform(0, 1.4, size=num_classes)
    expert_of_fine = rng.choice([0, 2, 3], size=num_fine)
    return nearest_fine, distance, expert_of_fine


def crowded_task(seed, num_classes, num_fine=12, num_dimensions=5):
    """Unit vectors in a small space, so that many centres matter; expert 1 of four has none."""
    rng = np.random.default_rng(seed)
    classes = rng.normal(size=(num_classes, num_dimensions))
    centers = rng.normal(size=(num_fine, num_dimensions))
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    return classes, centers, rng.choice([0, 2, 3], size=num_fine)


# --- the oracle: the formulas in plain loops -----------------------------------------------------


def slow_softmax(sums):
    total = math.fsum(math.exp(x - max(sums)) for x in sums)
    return [math.exp(x - max(sums)) / total for x in sums]


def slow_sums(affinity_of_class, expert_of_class, num_experts):
    sums = [0.0] * num_experts
    for affinity, expert in zip(affinity_of_class, expert_of_class, strict=True):
        sums[expert] += affinity
    return sums


def slow_eq6(distances, expert_of_class, num_experts, temperature):
    affinities = [math.exp(-d * d / temperature) for d in distances]
    return slow_softmax(slow_sums(affinities, expert_of_class, num_experts))


def slow_paper(distances, expert_of_class, num_experts, temperature):
    num_classes = len(distances)
    lam = temperature / math.log(num_classes) if num_classes > 200 else temperature
    affinities = []
    for d in distances:
        a = math.exp(-d * d / lam)
        if num_classes < 10:
            a *= math.exp(0.5 - math.sqrt(num_classes))
        affinities.append(a)
    return slow_softmax(slow_sums(affinities, expert_of_class, num_experts))


def slow_release(distances, expert_of_class, num_experts, _temperature):
    num_classes = len(distances)
    add = 0
    if num_classes < 10:
        add = math.exp(0.5 - math.sqrt(num_classes))
    mul = 5 * math.log10(max(10, num_classes - 200))
    affinities = [math.exp((add - d) * mul) for d in distances]
    sums = slow_sums(affinities, expert_of_class, num_experts)
    return slow_softmax([w / 8 for w in sums])


SLOW = {"eq6": slow_eq6, "paper": slow_paper, "release": slow_release}


def squared_distance(a, b):
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def slow_nearest(x, centers):
    best = 0
    for s in range(len(centers)):
        if squared_distance(x, centers[s]) < squared_distance(x, centers[best]):
            best = s
    return best, math.sqrt(squared_distance(x, centers[best]))


def slow_per_class(classes, centers, expert_of_fine, num_experts, temperature):
    rows = []
    for x in classes:
        affinities = [math.exp(-squared_distance(x, s) / temperature) for s in centers]
        total = math.fsum(affinities)
        rows.append([a / total for a in slow_sums(affinities, expert_of_fine, num_experts)])
    return rows


def slow_coarse(classes, centers, expert_of_fine, num_experts, temperature):
    experts, means = [], []
    for expert in range(num_experts):
        members = [c for c, e in zip(centers, expert_of_fine, strict=True) if e == expert]
        if members:
            experts.append(expert)
            means.append([math.fsum(column) / len(members) for column in zip(*members, strict=True)])
    nearest = [slow_nearest(x, means) for x in classes]
    expert_of_class = [experts[index] for index, _ in nearest]
    return slow_eq6([d for _, d in nearest], expert_of_class, num_experts, temperature)


def slow_entropy(weights):
    return -math.fsum(p * math.log(p) for p in weights if p > 0)


# --- the published rules -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "distance", "release", "paper", "eq6"),
    [
        ((2, 0), 0.6, 0.523, 0.533, 0.582),
        ((5, 2), 0.6, 0.508, 0.514, 0.621),
        ((7, 3), 0.6, 0.506, 0.660, 0.660),
        ((60, 40), 0.6, 0.531, 0.965, 0.965),
        ((600, 400), 0.6, 0.501, 0.500, 1.000),
        ((600, 400), 0.4, 0.519, 0.689, 1.000),
    ],
)
def test_known_weights_of_expert_0(split, distance, release, paper, eq6):
    classes, centers = make_task(np.repeat([0, 1], split), distance, num_fine=2)
    for rule, expected in (("release", release), ("paper", paper), ("eq6", eq6)):
        weights = route(classes, centers, np.array([0, 1]), num_experts=2, rule=rule).weights
        assert round(weights[0], 3) == expected, rule


@pytest.mark.parametrize("num_classes", NUM_CLASSES_AT_THRESHOLDS)
@pytest.mark.parametrize("rule", SLOW)
def test_published_rules_equal_the_oracle(rule, num_classes):
    for seed in range(5):
        nearest_fine, distance, expert_of_fine = random_task(seed, num_classes)
        classes, centers = make_task(nearest_fine, distance, num_fine=7)
        for temperature in (0.2, 0.05):
            routing = route(classes, centers, expert_of_fine, num_experts=4, rule=rule, temperature=temperature)
            expected = SLOW[rule](distance, expert_of_fine[nearest_fine], 4, temperature)
            np.testing.assert_allclose(routing.weights, expected, rtol=1e-9, atol=1e-300)
            np.testing.assert_array_equal(routing.nearest_fine, nearest_fine)
            np.testing.assert_allclose(routing.distance, distance, rtol=1e-12)
            assert routing.entropy == pytest.approx(slow_entropy(expected), abs=1e-12)


@pytest.mark.parametrize(("num_classes", "same"), [(9, False), (10, True), (200, True), (201, False)])
def test_paper_is_eq6_from_10_to_200_classes(num_classes, same):
    nearest_fine, distance, expert_of_fine = random_task(0, num_classes)
    classes, centers = make_task(nearest_fine, distance, num_fine=7)
    paper, eq6 = (
        route(classes, centers, expert_of_fine, num_experts=4, rule=rule).weights for rule in ("paper", "eq6")
    )
    assert np.array_equal(paper, eq6) == same


def test_release_has_no_temperature():
    classes, centers, expert_of_fine = crowded_task(0, num_classes=20)
    cold, warm = (
        route(classes, centers, expert_of_fine, num_experts=4, rule="release", temperature=t) for t in (0.01, 10.0)
    )
    np.testing.assert_array_equal(cold.weights, warm.weights)


@pytest.mark.parametrize("rule", ["paper", "eq6", "release", "coarse"])
def test_softmax_gives_an_expert_without_clusters_what_a_sum_of_0_gets(rule):
    classes, centers = make_task([0, 0, 0], 0.6, num_fine=1)
    weights = route(classes, centers, np.array([0]), num_experts=3, rule=rule).weights
    assert weights[1] == weights[2] > 0
    assert weights[0] > weights[1]


def test_thousands_of_classes_do_not_overflow():
    classes, centers = make_task(np.repeat([0, 1], [7000, 5000]), 0.0, num_fine=2)
    for rule in RULES:
        weights = route(classes, centers, np.array([0, 1]), num_experts=2, rule=rule).weights
        assert np.isfinite(weights).all(), rule


# --- the other rules -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.2, 0.1, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_per_class_and_share_equal_the_oracle(seed, temperature):
    classes, centers, expert_of_fine = crowded_task(seed, num_classes=9)
    task = {"num_experts": 4, "temperature": temperature}
    expected = np.array(slow_per_class(classes, centers, expert_of_fine, 4, temperature))

    per_class = route(classes, centers, expert_of_fine, rule="per_class", **task)
    np.testing.assert_allclose(per_class.weights, expected, rtol=1e-9)
    assert per_class.entropy == pytest.approx(np.mean([slow_entropy(row) for row in expected]))
    np.testing.assert_array_equal(per_class.weights[:, 1], 0)  # the expert without clusters

    mean = route(classes, centers, expert_of_fine, rule="share", **task)
    np.testing.assert_allclose(mean.weights, expected.mean(axis=0), rtol=1e-9)
    assert mean.entropy == pytest.approx(slow_entropy(expected.mean(axis=0)))


def test_share_of_classes_far_from_every_center_does_not_underflow():
    classes, centers = np.array([[100.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0]])
    shares = route(classes, centers, np.array([0, 1]), num_experts=2, rule="per_class", temperature=0.1).weights
    np.testing.assert_allclose(shares, [[0.0, 1.0]], atol=1e-300)


def test_share_is_the_same_in_any_chunks(monkeypatch):
    classes, centers, expert_of_fine = crowded_task(0, num_classes=50)
    whole = route(classes, centers, expert_of_fine, num_experts=4, rule="per_class", temperature=0.1).weights
    whole_nearest = nearest_centers(classes, centers)
    for max_distances in (1, 12, 100):
        monkeypatch.setattr(distances, "MAX_DISTANCES", max_distances)
        chunked = route(classes, centers, expert_of_fine, num_experts=4, rule="per_class", temperature=0.1).weights
        np.testing.assert_allclose(chunked, whole, rtol=1e-12)
        np.testing.assert_array_equal(nearest_centers(classes, centers)[0], whole_nearest[0])


@pytest.mark.parametrize("seed", range(5))
def test_coarse_equals_the_oracle(seed):
    classes, centers, expert_of_fine = crowded_task(seed, num_classes=15)
    routing = route(classes, centers, expert_of_fine, num_experts=4, rule="coarse")
    expected = slow_coarse(classes, centers, expert_of_fine, 4, 0.2)
    np.testing.assert_allclose(routing.weights, expected, rtol=1e-9)
    fine = [slow_nearest(x, centers) for x in classes]
    np.testing.assert_array_equal(routing.nearest_fine, [index for index, _ in fine])
    np.testing.assert_allclose(routing.distance, [distance for _, distance in fine])


@pytest.mark.parametrize("num_classes", [3, 50, 300])
def test_top1_is_one_hot_on_the_first_of_papers_best_experts(num_classes):
    classes, centers, expert_of_fine = crowded_task(num_classes, num_classes)
    paper = route(classes, centers, expert_of_fine, num_experts=4, rule="paper").weights
    top1 = route(classes, centers, expert_of_fine, num_experts=4, rule="top1")
    np.testing.assert_array_equal(top1.weights, np.eye(4)[paper.argmax()])
    assert top1.entropy == 0.0


def test_top1_breaks_a_tie_by_the_lowest_index():
    classes, centers = make_task([2, 1, 0, 2, 1], 0.6, num_fine=3)
    weights = route(classes, centers, np.array([0, 1, 2]), num_experts=3, rule="top1").weights
    np.testing.assert_array_equal(weights, [0, 1, 0])


def test_top1_sees_a_lead_that_the_softmax_rounds_away():
    classes, centers = make_task(np.repeat([0, 1], [150, 151]), 1.2, num_fine=2)
    paper, top1 = (
        route(classes, centers, np.array([0, 1]), num_experts=2, rule=rule).weights for rule in ("paper", "top1")
    )
    assert paper[0] == paper[1]
    np.testing.assert_array_equal(top1, [0, 1])


def test_uniform_ignores_the_task():
    classes, centers, expert_of_fine = crowded_task(0, num_classes=5)
    routing = route(classes, centers, expert_of_fine, num_experts=5, rule="uniform")
    np.testing.assert_array_equal(routing.weights, [0.2] * 5)
    assert routing.entropy == pytest.approx(math.log(5))


# --- rows that are tasks of their own, and the budget ----------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_each_row_gets_what_it_would_get_alone(rule):
    classes, centers, expert_of_fine = crowded_task(4, num_classes=7)
    given = {"num_experts": 4, "rule": rule}
    together = route(classes, centers, expert_of_fine, each=True, **given).weights
    assert together.shape == (7, 4)
    for x, row in zip(classes, together, strict=True):
        alone = route(x[None], centers, expert_of_fine, **given).weights
        np.testing.assert_allclose(row, alone.reshape(4), rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("each", [False, True])
def test_a_vector_of_zeros_says_nothing(rule, each):
    """It gets each expert's share of the centres, and the other classes are routed as without it."""
    classes, centers, expert_of_fine = crowded_task(6, num_classes=7)
    prior = np.bincount(expert_of_fine, minlength=4) / len(expert_of_fine)
    given = {"num_experts": 4, "rule": rule, "each": each}
    alone = route(np.zeros((1, classes.shape[1])), centers, expert_of_fine, **given).weights
    np.testing.assert_allclose(alone.ravel(), [0.25] * 4 if rule == "uniform" else prior)
    with_it = route(np.vstack([classes, np.zeros(classes.shape[1])]), centers, expert_of_fine, **given).weights
    without = route(classes, centers, expert_of_fine, **given).weights
    if with_it.ndim == 2:
        np.testing.assert_array_equal(with_it[:7], without)
        np.testing.assert_allclose(with_it[7], alone.ravel())
    elif rule == "share":
        np.testing.assert_allclose(with_it, (7 * without + prior) / 8)
    else:
        np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("max_experts", [1, 2, 3, 9])
def test_budget_keeps_the_experts_with_most_weight(rule, max_experts):
    classes, centers, expert_of_fine = crowded_task(6, num_classes=7)
    whole = route(classes, centers, expert_of_fine, num_experts=4, rule=rule).weights
    few = route(classes, centers, expert_of_fine, num_experts=4, rule=rule, max_experts=max_experts).weights
    mean = np.atleast_2d(whole).mean(axis=0)
    kept = sorted(sorted(range(4), key=lambda k: (-mean[k], k))[:max_experts])
    np.testing.assert_allclose(few.sum(axis=-1), 1)
    assert not np.delete(few, kept, axis=-1).any()
    left = np.take(whole, kept, axis=-1).sum(axis=-1, keepdims=True)
    expected = np.take(whole, kept, axis=-1) / np.where(left > 0, left, 1)
    np.testing.assert_allclose(np.take(few, kept, axis=-1), expected, rtol=1e-12)


def test_budget_of_rows_that_trust_different_experts():
    weights = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(keep_best(weights, 1), [[1, 0, 0]] * 3)  # the third has nothing left: equal shares
    np.testing.assert_allclose(keep_best(weights, 1, per_row=True), [[1, 0, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(keep_best(np.full(4, 0.25), 2), [0.5, 0.5, 0, 0])
    with pytest.raises(ModeclipError, match="max_experts: expected 1 or more, got 0"):
        keep_best(weights, 0)


# --- class embeddings ------------------------------------------------------------------------------


def letters(texts):
    counts = np.array([[text.count(letter) + 0.1 for letter in "abct"] for text in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_prompts_are_averaged_as_unit_vectors():
    names = ["cat", "bat"]
    np.testing.assert_array_equal(embed_classes(letters, names), letters(names))
    got = embed_classes(letters, names, ["{}", "a {} at a {}"])
    both = np.stack([letters(names), letters(["a cat at a cat", "a bat at a bat"])]).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(got, both / np.linalg.norm(both, axis=1, keepdims=True), rtol=1e-6)
    assert got.dtype == np.float32
    with pytest.raises(ModeclipError, match=r"template 'a photo' has no \{\}"):
        embed_classes(letters, names, ["a photo"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_everything_is_computed_in_float64(rule, dtype):
    classes, centers, expert_of_fine = crowded_task(1, num_classes=6)
    classes, centers = classes.astype(dtype), centers.astype(dtype)
    given_type = route(classes, centers, expert_of_fine, num_experts=4, rule=rule)
    exact = route(
        classes.astype(np.float64),
        centers.astype(np.float64),
        expert_of_fine.astype(np.int32),
        num_experts=4,
        rule=rule,
    )
    assert given_type.weights.dtype == given_type.distance.dtype == np.float64
    np.testing.assert_array_equal(given_type.weights, exact.weights)
    np.testing.assert_array_equal(given_type.distance, exact.distance)


# --- invariants ----------------------------------------------------------------------------------


@st.composite
def tasks(draw):
    """Any task: coordinates on a coarse grid, so that ties and doubles are common."""
    num_dimensions = draw(st.integers(1, 4))
    num_fine, num_experts = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    num_classes = draw(st.integers(1, 12)) + draw(st.sampled_from([0, 0, 200]))
    grid = st.integers(-4, 4).map(lambda step: step / 4)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    classes = rng.integers(-4, 5, size=(num_classes, num_dimensions)) / 4
    centers = draw(arrays.arrays(np.float64, (num_fine, num_dimensions), elements=grid))
    expert_of_fine = rng.integers(num_experts, size=num_fine)
    return classes, centers, expert_of_fine, num_experts


def weigh(task, rule) -> Routing:
    classes, centers, expert_of_fine, num_experts = task
    temperature = DEFAULT_TEMPERATURE[rule]
    return route(
        classes,
        centers,
        expert_of_fine,
        num_experts=num_experts,
        rule=rule,
        temperature=temperature,
    )


@given(tasks(), st.sampled_from(RULES))
@settings(max_examples=80, deadline=None)
def test_weights_are_a_distribution(task, rule):
    routing = weigh(task, rule)
    num_classes, num_experts = len(task[0]), task[3]
    shape = (num_classes, num_experts) if rule == "per_class" else (num_experts,)
    assert routing.weights.shape == shape
    assert (routing.weights >= 0).all()
    np.testing.assert_allclose(routing.weights.sum(axis=-1), 1, rtol=1e-12)
    assert 0 <= routing.entropy <= math.log(num_experts) + 1e-12


@given(tasks(), st.sampled_from([rule for rule in RULES if rule != "top1"]), st.randoms())
@settings(max_examples=80, deadline=None)
def test_renaming_the_experts_renames_the_weights(task, rule, random):
    classes, centers, expert_of_fine, num_experts = task
    new_name = np.array(random.sample(range(num_experts), num_experts))
    renamed = weigh((classes, centers, new_name[expert_of_fine], num_experts), rule).weights
    if rule == "coarse":  # a class as near to two experts goes to the one with the lower index
        means = np.stack([centers[expert_of_fine == e].mean(0) for e in np.unique(expert_of_fine)])
        gaps = np.linalg.norm(classes[:, None] - means, axis=2)
        nearest_two = np.sort(gaps, axis=1)[:, :2]
        if len(means) > 1 and (np.diff(nearest_two) < 1e-6).any():
            return
    np.testing.assert_allclose(renamed[..., new_name], weigh(task, rule).weights, atol=1e-12)


@given(tasks(), st.sampled_from(RULES), st.randoms())
@settings(max_examples=80, deadline=None)
def test_the_order_of_the_classes_does_not_matter(task, rule, random):
    classes, *rest = task
    order = np.array(random.sample(range(len(classes)), len(classes)))
    routing, shuffled = weigh(task, rule), weigh((classes[order], *rest), rule)
    np.testing.assert_array_equal(shuffled.nearest_fine, routing.nearest_fine[order])
    np.testing.assert_array_equal(shuffled.distance, routing.distance[order])
    if rule == "per_class":
        np.testing.assert_allclose(shuffled.weights, routing.weights[order], atol=1e-12)
    elif rule != "top1":  # sums in another order may round a tie either way
        np.testing.assert_allclose(shuffled.weights, routing.weights, atol=1e-12)


@given(tasks(), st.sampled_from([rule for rule in RULES if rule != "coarse"]))
@settings(max_examples=80, deadline=None)
def test_a_center_far_from_every_class_changes_nothing(task, rule):
    classes, centers, expert_of_fine, num_experts = task
    assume(classes.any(axis=1).all())  # a vector of zeros says nothing, wherever the centres are
    far = np.full((2, centers.shape[1]), 1000.0)
    crowd = (np.concatenate([centers, far]), np.append(expert_of_fine, [0, num_experts - 1]))
    np.testing.assert_allclose(
        weigh((classes, *crowd, num_experts), rule).weights, weigh(task, rule).weights, atol=1e-12
    )


@given(tasks(), st.sampled_from(["eq6", "paper", "release", "top1"]))
@settings(max_examples=80, deadline=None)
def test_doubling_a_center_changes_nothing_where_only_the_nearest_counts(task, rule):
    classes, centers, expert_of_fine, num_experts = task
    assume(classes.any(axis=1).all())  # a vector of zeros says nothing, wherever the centres are
    twice = (np.concatenate([centers, centers]), np.tile(expert_of_fine, 2))
    routing, doubled = weigh(task, rule), weigh((classes, *twice, num_experts), rule)
    np.testing.assert_array_equal(doubled.nearest_fine, routing.nearest_fine)
    np.testing.assert_array_equal(doubled.weights, routing.weights)


@given(tasks(), st.sampled_from(RULES))
@settings(max_examples=40, deadline=None)
def test_moving_everything_changes_no_weight(task, rule):
    classes, centers, *rest = task
    assume(classes.any(axis=1).all() and (classes + 0.25).any(axis=1).all())  # a vector of zeros says nothing
    moved = weigh((classes + 0.25, centers + 0.25, *rest), rule).weights  # exact on the grid
    np.testing.assert_allclose(moved, weigh(task, rule).weights, atol=1e-9)


# --- errors --------------------------------------------------------------------------------------

CLASSES, CENTERS, EXPERTS = np.zeros((3, 2)), np.ones((4, 2)), np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "best"}, "unknown rule 'best'; known: paper, eq6, release, uniform, coarse, top1, share, per_class"),
        ({"temperature": 0.0}, r"temperature.*finite.*above 0, got 0\.0"),
        ({"temperature": math.nan}, "temperature.*finite.*above 0, got nan"),
        ({"class_embeddings": np.zeros((0, 2))}, r"class_embeddings.*matrix.*1 or more.*got shape \(0, 2\)"),
        ({"class_embeddings": np.zeros(2)}, r"class_embeddings.*matrix.*1 or more.*got shape \(2,\)"),
        ({"fine_centers": np.zeros((0, 2))}, r"fine_centers.*matrix.*1 or more.*got shape \(0, 2\)"),
        (
            {"class_embeddings": np.zeros((3, 5))},
            "class_embeddings: expected 2 .*fine_centers.*got 5; use the encoder .*",
        ),
        ({"class_embeddings": np.array([[0.0, 0.0], [0.0, math.nan]])}, "class_embeddings.*row 1 .*not finite"),
        ({"fine_centers": np.full((4, 2), math.inf)}, "fine_centers.*row 0 .*not finite"),
        ({"expert_of_fine": np.array([0, 1])}, r"expert_of_fine.*integer.* 4 fine centers, got int64 .*\(2,\)"),
        ({"expert_of_fine": np.zeros(4)}, r"expert_of_fine.*integer.* 4 fine centers, got float64 .*\(4,\)"),
        ({"expert_of_fine": np.array([0, 1, 2, 1])}, r"expert_of_fine: expected 0 to 1 .*got 2 at fine cluster 2"),
        ({"expert_of_fine": np.array([0, 1, 1, -1])}, r"expert_of_fine: expected 0 to 1 .*got -1 at fine cluster 3"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_be_routed_is_said(rule, change, message):
    arguments = {
        "class_embeddings": CLASSES,
        "fine_centers": CENTERS,
        "expert_of_fine": EXPERTS,
        "num_experts": 2,
        "rule": rule,
    }
    with pytest.raises(ModeclipError, match=f"^{message}$"):
        route(**arguments | change)


class Jaxlike:
    """An array of another library, which numpy reads by its ``__array__``."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.values


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("convert", [np.ndarray.tolist, torch.tensor, lambda x: torch.tensor(x).float(), Jaxlike])
def test_any_arrays_give_the_same_routing(rule, convert):
    classes, centers, expert_of_fine = crowded_task(1, num_classes=6)
    classes, centers = (x.astype(np.float32).astype(np.float64) for x in (classes, centers))
    expected = route(classes, centers, expert_of_fine, num_experts=4, rule=rule)
    owners = convert(expert_of_fine)
    owners = owners.int() if isinstance(owners, torch.Tensor) else owners
    found = route(convert(classes), convert(centers), owners, num_experts=4, rule=rule)
    assert type(found.weights) is type(found.distance) is np.ndarray
    np.testing.assert_array_equal(found.weights, expected.weights)
    np.testing.assert_array_equal(found.nearest_fine, expected.nearest_fine)


def test_tensors_with_a_gradient_and_whole_numbers_are_routed():
    learned = torch.tensor(CLASSES, requires_grad=True)
    expected = route(CLASSES, CENTERS, EXPERTS, num_experts=2)
    np.testing.assert_array_equal(route(learned, CENTERS, EXPERTS, num_experts=2).weights, expected.weights)
    assert route([[0, 1], [3, 1]], [[0, 0], [3, 0]], [0, 1], num_experts=2).distance.tolist() == [1, 1]


@pytest.mark.parametrize("wrong", ["cats", [["cat", "dog"]], [[1.0], [1.0, 2.0]], np.array([[1j, 0]])])
def test_what_is_no_numbers_is_refused(wrong):
    with pytest.raises(ModeclipError, match=r"^class_embeddings: expected an array of numbers, got [^\n]*$"):
        route(wrong, CENTERS, EXPERTS, num_experts=2)


def test_the_default_is_per_class_at_its_own_temperature():
    default = route(CLASSES, CENTERS, EXPERTS, num_experts=2)
    given = route(CLASSES, CENTERS, EXPERTS, num_experts=2, rule="per_class", temperature=0.1)
    np.testing.assert_array_equal(default.weights, given.weights)


def test_a_budget_of_no_expert_is_refused():
    with pytest.raises(ModeclipError, match=r"^max_experts: expected 1 or more, got 0$"):
        route(CLASSES, CENTERS, EXPERTS, num_experts=2, max_experts=0)


@pytest.mark.parametrize("rule", RULES)
def test_lists_and_torch_tensors_are_arrays_too(rule):
    arrays = CLASSES, CENTERS, EXPERTS
    expected = route(*arrays, num_experts=2, rule=rule).weights
    for same in ([x.tolist() for x in arrays], [torch.from_numpy(np.array(x)) for x in arrays]):
        assert (route(*same, num_experts=2, rule=rule).weights == expected).all()
    with pytest.raises(ModeclipError, match=r"class_embeddings: expected an array of numbers"):
        route([["a cat"]], CENTERS, EXPERTS, num_experts=2)


def test_every_rule_has_a_default_temperature():
    assert list(DEFAULT_TEMPERATURE) == list(RULES)
    assert {rule for rule, value in DEFAULT_TEMPERATURE.items() if value != 0.2} == {
        "share",
        "per_class",
    }
