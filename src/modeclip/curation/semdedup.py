"""SemDeDup: inside a cluster of similar vectors, a pair is dropped if it nearly repeats one that stays.

Members of a cluster stand in an order, the most welcome first. One after the other, a member is dropped if its cosine
with a member before it is above a threshold, 1 - eps. Which of those before it count is a choice:

- Only those that stay (the default). Then each dropped pair has a near copy among the kept ones, and no two kept pairs
  of a cluster are near copies.
- All of them, as published (``chain``): what is dropped itself still drops others. A row of pictures that change a
  little from one to the next goes as a whole, except for its first, however unlike its ends are.

Few cosines are computed exactly. A product in bfloat16 (where the processor multiplies it fast, else in float32) rules
out all that the proven bound on its rounding errors allows; float64 decides the rest, as far as it matters. So the
answer is that of a brute-force search in float64, whatever the precision and the size of a block. Identical vectors, of
which captions have many, are compared once.

Source: SemDeDup (arXiv 2303.09540), Sec. 3. The order by distance to the centre is theirs; that only those count which
stay is ours.

Price: half of the product of a cluster with itself, less where much is dropped, and with few near copies little else.
Memory: 6 D bytes for each member of the clusters that are searched at a time, and a block of products for each thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.distances import BFLOAT16_UNIT, blocks, has_fast_bfloat16

if TYPE_CHECKING:
    import torch

MEMBERS_AT_ONCE = 512
"""Members that are compared with those before them at a time."""
EARLIER_AT_ONCE = 2048
"""Members that a block is compared with at a time: 2 MiB of products in bfloat16, 4 MiB in float32."""
PAIRS_AT_ONCE = 1 << 13
"""Pairs whose exact cosines are computed at a time."""


def find_near_copies(
    x: Float[np.ndarray, "n D"], threshold: float
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Find the members of a cluster that nearly repeat one before them that stays.

    Args:
        x: Unit vectors, float32, in the order of the members, the most welcome first. A vector of zeros is like no
            other.
        threshold: Cosine above which a member is dropped, in [0, 1).

    Returns:
        For each member the position of the first one that drops it, -1 if it stays; and their cosine, NaN if it stays.

    Examples:
        >>> x = np.array([[1, 0], [0.96, 0.28], [0.8432, 0.5376]], np.float32)
        >>> find_near_copies(x, 0.95)[0].tolist(), nearest_before(x)[0].tolist()
        ([-1, 0, -1], [-1, 0, 1])
    """
    first, inverse = _distinct(x)
    rows = np.ascontiguousarray(x[first])
    copy_of, cosine = np.full(len(rows), -1), np.full(len(rows), np.nan)
    products, staying = _Products(rows), np.empty(0, np.int64)
    for block in blocks(len(rows), MEMBERS_AT_ONCE):
        members = np.arange(block.start, block.stop)
        for earlier in (staying, members):
            members, earlier = (some[copy_of[some] < 0] for some in (members, earlier))
            _drop(rows, threshold, *products.above(threshold, members, earlier), copy_of, cosine)
        staying = np.concatenate([staying, members[copy_of[members] < 0]])
    stays = copy_of < 0
    of = np.where(stays, first, first[copy_of])[inverse]
    of[first[stays]] = -1
    return of, np.where(of < 0, np.nan, np.where(stays, 1.0, cosine)[inverse])


def _drop(
    x: Float[np.ndarray, "n D"],
    threshold: float,
    later: Int[np.ndarray, " p"],
    before: Int[np.ndarray, " p"],
    copy_of: Int[np.ndarray, " n"],
    cosine: Float[np.ndarray, " n"],
) -> None:
    """Note in ``copy_of`` and ``cosine`` which members are dropped, by pairs that may be near, sorted by both sides.

    Exact cosines cost more than all else, and in a group of g near copies only g - 1 of g (g - 1) / 2 decide. So pairs
    are taken in rounds: each decides the first pair of every member whose other side has no pair left and so stays.
    What is dropped takes its pairs along.
    """
    while len(later):
        first = np.flatnonzero(np.diff(later, prepend=-1))
        is_open = np.zeros(len(x), bool)
        is_open[later] = True
        first = first[~is_open[before[first]]]
        exact = _cosines(x, later[first], before[first])
        near = exact > threshold
        dropped = later[first[near]]
        copy_of[dropped], cosine[dropped] = before[first[near]], exact[near]
        left = (copy_of[later] < 0) & (copy_of[before] < 0)
        left[first] = False
        later, before = later[left], before[left]


def nearest_before(x: Float[np.ndarray, "n D"]) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return for each member the nearest of all before it, and their cosine; -1 and -1.0 for one that has none.

    With these, any threshold says at once what is dropped if dropped members drop others (``chain``). Of equally near
    members the first counts.

    Args:
        x: As for `find_near_copies`.
    """
    first, inverse = _distinct(x)
    rows = np.ascontiguousarray(x[first])
    nearest, cosine = np.full(len(rows), -1), np.full(len(rows), -1.0)
    products = _Products(rows)
    for block in blocks(len(rows), MEMBERS_AT_ONCE):
        members = np.arange(block.start, block.stop)
        later, before = products.nearest(members, np.arange(block.stop))
        exact = _cosines(rows, later, before)
        order = np.lexsort((before, -exact, later))
        some, best = np.unique(later[order], return_index=True)
        nearest[some], cosine[some] = before[order][best], exact[order][best]
    of = np.where(nearest < 0, -1, first[nearest])[inverse]
    cosine = cosine[inverse]
    repeats = first[inverse] != np.arange(len(x))
    of[repeats], cosine[repeats] = first[inverse[repeats]], 1.0
    return of, cosine


def _distinct(x: Float[np.ndarray, "n D"]) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " n"]]:
    """Return the first member with each vector, ascending, and for every member which of these it is.

    A vector of zeros says nothing, so it is alone.
    """
    represented_by, some = np.arange(len(x)), np.flatnonzero(x.any(1))
    if some.size:
        known = np.ascontiguousarray(x[some])
        odd = np.random.default_rng(0).integers(1 << 31, size=x.shape[1], dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        hashes = np.vecdot(known.view(np.uint32), odd)  # modulo 2^32, whatever the order of the sum
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        if not np.array_equal(known, known[first[inverse]]):
            whole = known.view(np.dtype((np.void, known.itemsize * known.shape[1]))).reshape(-1)
            _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
        represented_by[some] = some[first[inverse]]
    return np.unique(represented_by, return_inverse=True)


class _Products:
    """Finds pairs of rows that may be near, by products that are off by no more than ``error``."""

    def __init__(self, x: Float[np.ndarray, "n D"]) -> None:
        import torch

        self.rows = torch.from_numpy(x)
        self.error = 2 * (x.shape[1] + 16) * 2.0**-23
        if has_fast_bfloat16("cpu"):
            exact, self.rows = self.rows, self.rows.bfloat16()
            parts = (torch.linalg.vector_norm(exact[b] - self.rows[b].float(), dim=1) for b in blocks(len(x), 4096))
            lost = max((float(part.max()) for part in parts), default=0.0)
            # |x.y - x'.y'| <= |x - x'||y| + |x'||y - y'|, and the product itself is stored in bfloat16
            self.error += 2.02 * lost + 1.02 * BFLOAT16_UNIT

    def above(
        self, threshold: float, members: Int[np.ndarray, " m"], earlier: Int[np.ndarray, " e"]
    ) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        """Return all pairs of a member and one before it whose cosine may be above a threshold."""
        least = threshold - self.error
        found = [_places(scores >= least, start) for start, scores in self._scores(members, earlier)]
        return _pairs(members, earlier, found)

    def nearest(
        self, members: Int[np.ndarray, " m"], earlier: Int[np.ndarray, " e"]
    ) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        """Return all pairs of a member and one before it that may be the nearest of those."""
        import torch

        found, top = [], torch.full((len(members), 1), -np.inf)
        for start, scores in self._scores(members, earlier):
            top = torch.maximum(top, scores.amax(1, keepdim=True).float())
            found.append(_places(scores.float() >= top - 2 * self.error, start))
        return _pairs(members, earlier, found)

    def _scores(
        self, members: Int[np.ndarray, " m"], earlier: Int[np.ndarray, " e"]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield products of the members with a part of the others, and where it begins; both are ascending."""
        import torch

        rows = self.rows.index_select(0, torch.from_numpy(members))
        for part in blocks(len(earlier) if len(members) else 0, EARLIER_AT_ONCE):
            some = earlier[part]
            scores = rows @ self.rows.index_select(0, torch.from_numpy(some)).T
            if some[-1] >= members[0]:
                scores.masked_fill_(torch.from_numpy(some >= members[:, None]), -torch.inf)
            yield part.start, scores


def _places(is_near: torch.Tensor, start: int) -> Int[np.ndarray, "p 2"]:
    """Return rows and columns of what is true; the first column has the number ``start``."""
    row, column = divmod(np.flatnonzero(is_near.numpy()), is_near.shape[1])
    return np.stack([row, column + start], 1)


def _pairs(
    members: Int[np.ndarray, " m"], earlier: Int[np.ndarray, " e"], found: list[np.ndarray]
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """Return members and those before them from their places, sorted by both."""
    one, other = np.concatenate([np.empty((0, 2), np.int64), *found]).T
    order = np.argsort(one, kind="stable") if len(found) > 1 else np.arange(len(one))  # each part is sorted
    one, other = members[one[order]], earlier[other[order]]
    is_before = other < one
    return one[is_before], other[is_before]


def _cosines(
    x: Float[np.ndarray, "n D"], one: Int[np.ndarray, " p"], other: Int[np.ndarray, " p"]
) -> Float[np.ndarray, " p"]:
    """Return exact cosines of pairs of unit vectors."""
    exact = np.empty(len(one))
    for part in blocks(len(one), PAIRS_AT_ONCE):
        exact[part] = np.vecdot(x[one[part]].astype(np.float64), x[other[part]].astype(np.float64))
    return exact
