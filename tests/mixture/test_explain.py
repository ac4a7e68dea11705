"""What is out of domain: by the quantiles of the captions, and for a whole task by how many of its names are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.novelty import FineQuantiles, NearCaptions, fit_quantiles
from modeclip.mixture.explain import FAR, Domain, flag, warning
from support import grouped_rows

KNOWN = FineQuantiles(levels=(0.5, 0.95), distances=np.array([[0.4, 0.8], [0.1, 0.2]], np.float32))


def domain_of(*distances: float, fine: int = 0) -> Domain:
    found = Domain.of(np.zeros((len(distances), 2)), np.full(len(distances), fine), np.array(distances), KNOWN)
    assert found is not None
    return found


def test_a_name_is_out_beyond_the_captions_of_its_own_cluster() -> None:
    assert domain_of(0.1, 0.79, 0.81).out.tolist() == [False, False, True]
    assert domain_of(0.1, 0.79, 0.81, fine=1).out.tolist() == [False, True, True]
    np.testing.assert_allclose(domain_of(0.2, 0.4, 0.6, 0.9).quantile, [0.25, 0.5, 0.725, 1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("num_out", "total", "expected"),
    [
        (0, 1, False),
        (1, 1, True),
        (1, 2, False),
        (2, 2, True),
        (1, 4, False),
        (2, 8, True),
        (2, 9, False),
        (3, 12, True),
    ],
)
def test_a_task_is_out_if_a_quarter_of_its_names_are_and_no_single_one_of_several(
    num_out: int, total: int, expected: bool
) -> None:
    domain = domain_of(*[0.9] * num_out, *[0.1] * (total - num_out))
    assert domain.is_out is expected
    assert flag(domain) == {
        "out_of_domain": expected,
        "domain": {
            "distance": pytest.approx((0.9 * num_out + 0.1 * (total - num_out)) / total),
            "quantile": pytest.approx((num_out + 0.125 * (total - num_out)) / total),
            "nearest": "centre",
            "names_out": num_out,
            "names": total,
        },
    }


def test_what_is_not_known_is_null() -> None:
    assert Domain.of(np.eye(1), np.zeros(1, int), np.ones(1), None) is None
    short = FineQuantiles(levels=(0.1, 0.5), distances=np.ones((1, 2), np.float32))
    assert Domain.of(np.eye(1), np.zeros(1, int), np.ones(1), short) is None
    assert flag(None) == {"out_of_domain": None, "domain": None}
    assert warning(["a"], None) == ""


def test_the_warning_names_what_is_far() -> None:
    assert warning(["a", "b"], domain_of(0.1, 0.1)) == ""
    assert "1 of 3 names lie farther" in warning(["a", "trouser", "c"], domain_of(0.1, 0.9, 0.1))
    said = warning(["trouser"], domain_of(0.9))
    assert said.startswith("out of domain: 1 of 1 names")
    assert said.endswith("'trouser'")


def test_held_out_rows_of_the_same_source_are_called_out_a_few_times_in_a_hundred() -> None:
    x = grouped_rows(6000, 16, 0)
    seen, held_out = x[::2], x[1::2]
    centers = kmeans(seen, 20, seed=0).centers
    fine, squared = assign_nearest(seen, centers)
    quantiles = fit_quantiles(fine, np.sqrt(squared), 20)
    fine, squared = assign_nearest(held_out, centers)
    domain = Domain.of(held_out, fine, np.sqrt(squared), quantiles)
    assert domain is not None
    assert 1 - FAR - 0.02 < domain.out.mean() < 1 - FAR + 0.04
    assert not domain.is_out
    beyond = Domain.of(held_out, fine, np.sqrt(squared) + 1, quantiles)
    assert beyond is not None
    assert beyond.is_out


def test_a_stranger_inside_a_wide_cluster_is_out_by_its_nearest_caption() -> None:
    """Two far groups share a centre between them: what lies at the centre is near to it, and to no caption."""
    draw = np.random.default_rng(0)
    groups = np.repeat(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 200, axis=0)
    x = (groups + draw.normal(0, 0.02, groups.shape)).astype(np.float32)
    center = x.mean(axis=0, keepdims=True)
    fine, distance = np.zeros(len(x), int), np.linalg.norm(x - center, axis=1)
    by_centre = fit_quantiles(fine, distance, 1)
    by_caption = replace(by_centre, near=NearCaptions.fit(x))
    for quantiles, expected in ((by_centre, False), (by_caption, True)):
        asked = np.concatenate([center, x[:1] + 0.001]).astype(np.float32)
        domain = Domain.of(asked, np.zeros(2, int), np.linalg.norm(asked - center, axis=1), quantiles)
        assert domain is not None
        assert domain.out.tolist() == [expected, False]
        assert domain.nearest == ("caption" if expected else "centre")
        said = warning(["stranger", "known"], domain)
        assert ("nearest caption than 90% of the captions from theirs" in said) is expected
