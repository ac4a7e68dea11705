"""Multistage clusters: each a part of one of the stage before, none too small, and every pair in one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeclip.adapting import multistage
from modeclip.adapting.multistage import merge_small, refine_clusters
from modeclip.errors import ModeclipError


def make_vectors(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors around three directions for images and three for texts."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(2):
        vectors = np.eye(6)[draw.integers(0, 3, count)] + 0.1 * draw.normal(size=(count, 6))
        found.append((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    return found[0], found[1]


@settings(max_examples=15)
@given(count=st.integers(20, 200), min_pairs=st.integers(1, 30), seed=st.integers(0, 3))
def test_clusters_accumulate(count: int, min_pairs: int, seed: int) -> None:
    clusters = [np.zeros(count, np.int64)]
    for stage in range(3):
        images, texts = make_vectors(count, 7 * seed + stage)
        found = refine_clusters(clusters[-1], images, texts, min_pairs=min_pairs, seed=seed)
        assert found.num_clusters == found.num_found - found.num_merged <= 9 ** (stage + 1)
        assert np.bincount(found.cluster).min() >= min(min_pairs, count)
        parents = {(one, before) for one, before in zip(found.cluster.tolist(), clusters[-1].tolist(), strict=True)}
        assert len(parents) == found.num_clusters, "a cluster is a part of one of the stage before"
        again = refine_clusters(clusters[-1], images, texts, min_pairs=min_pairs, seed=seed)
        assert (again.cluster == found.cluster).all()
        clusters.append(found.cluster)


def test_joint_clusters_are_those_that_the_vectors_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three well separated directions each: nine kinds of pairs, found whatever the blocks."""
    images, texts = make_vectors(300, 0)
    kinds = 3 * images[:, :3].argmax(1) + texts[:, :3].argmax(1)
    monkeypatch.setattr(multistage, "ROWS_AT_ONCE", 64)
    found = refine_clusters(np.zeros(300, np.int64), images, texts).cluster
    assert len(set(zip(kinds.tolist(), found.tolist(), strict=True))) == 9


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    least=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_small_clusters_go_to_the_nearest(sizes: list[int], least: int, seed: int) -> None:
    """The oracle merges lists of pairs, one after the other."""
    draw = np.random.default_rng(seed)
    pairs = {number: draw.normal(size=(size, 2)) for number, size in enumerate(sizes)}
    parents = np.sort(draw.integers(0, 2, len(sizes)))
    sums = np.array([vectors.sum(0) for vectors in pairs.values()])
    expected = list(range(len(sizes)))
    for parent in (0, 1):
        left = [number for number in pairs if parents[number] == parent]
        while len(left) > 1 and min(len(pairs[number]) for number in left) < least:
            small = min(left, key=lambda number: (len(pairs[number]), number))
            left.remove(small)
            center = pairs[small].mean(0)
            nearest = min(left, key=lambda number: np.linalg.norm(pairs[number].mean(0) - center))
            pairs[nearest] = np.concatenate([pairs[nearest], pairs[small]])
            expected = [nearest if one == small else one for one in expected]
    assert merge_small(np.array(sizes), parents, sums, least).tolist() == expected


def test_fewer_pairs_than_clusters() -> None:
    images, texts = make_vectors(2, 0)
    with pytest.raises(ModeclipError, match=r"2 pairs are fewer than 3 clusters.*more pairs or fewer"):
        refine_clusters(np.zeros(2, np.int64), images, texts)
