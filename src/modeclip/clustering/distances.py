"""Rows and centres in, exact nearest centres and squared Euclidean distances out, a block of rows at a time.

Method: one low-precision product per block (bfloat16 where the processor multiplies it fast, else float32) scores all
centres, relative to their mean. What rounding can have done to a score has a proven bound (Cauchy-Schwarz over the
rounding errors of the row and of the centres, plus those of the sum and of the stored score). Centres that could be
nearest within that bound, for most rows one, go on to float64 differences, which decide, the lowest index on a tie. So
the answer is that of a brute-force search in float64, whatever the precision and the size of a block.

Price: the product of (N, D) with (M, D), in bfloat16 with several times as much again for the search; memory is the
input, the output and one block for each thread. Measured beside faiss in ``benchmarks/kmeans_faiss.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError

if TYPE_CHECKING:
    import torch

SCORES_IN_MEMORY = 1 << 20
"""Entries of a block of the N x M score matrix: 2 MiB of bfloat16, 4 MiB of float32; near the cache is fastest."""
ROWS_IN_MEMORY = 1 << 11
"""Rows of a block where only N x D work is done, and most rows of any block."""
PAIRS_IN_MEMORY = 1 << 20
"""Near ties of a block that are looked at together; a block with more is cut in two."""
GROUP = 16
"""Centres that share one maximum in the search for near ties: few groups of few are looked at twice."""
SMALLEST_GROUPED = 64
"""Number of centres from which they are searched in groups."""
BFLOAT16_WORK = 1 << 20
"""Multiplications of a block from which bfloat16 pays."""
BFLOAT16_UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""


def nearest(
    x: Float[np.ndarray, "N D"],
    centers: Float[np.ndarray, "M D"],
    *,
    chunk_rows: int | None = None,
    device: str = "cpu",
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Return each row's nearest centre and the squared Euclidean distance to it.

    Exact: low-precision products only narrow the choice, and where they cannot tell two centres apart float64
    differences decide, the lowest index on a tie. So the answer does not depend on how many rows are asked at once.

    Args:
        x: Rows.
        centers: Centres, at least one.
        chunk_rows: Rows compared with all centres at a time; None: as many as keep a block of 4 MiB.
        device: Torch device of the distance products.

    Returns:
        Index of the nearest centre (int64) and squared distance (float32) per row.

    Raises:
        ModeclipError: an input is not a matrix of finite numbers, or the two differ in width.

    Examples:
        >>> index, squared_distance = nearest(np.array([[0.0, 3.0]]), np.array([[4.0, 3.0], [0.0, 1.0]]))
        >>> index.tolist(), squared_distance.tolist()
        ([1], [4.0])
    """
    rows, points = checked("x", x), checked("centers", centers)
    if rows.shape[1] != points.shape[1]:
        raise ModeclipError(
            f"x and centers must have the same width, got {rows.shape[1]} and {points.shape[1]}: "
            "both must come from the same encoder"
        )
    if len(points) == 0:
        raise ModeclipError("centers is empty: at least one centre is needed")
    if chunk_rows is not None and chunk_rows < 1:
        raise ModeclipError(f"chunk_rows must be 1 or more, got {chunk_rows}")
    index = np.empty(len(rows), np.int64)
    squared = np.empty(len(rows), np.float32)
    scorer = Scorer(points, device)

    def work(block: slice) -> None:
        index[block] = _nearest_block(rows[block], scorer)
        squared[block] = squared_distances(rows[block], points, index[block])

    for_each_block(len(rows), chunk_rows or scorer.block_rows, work, device)
    return index, squared


def checked(name: str, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "N D"]:
    """Return a matrix as finite, contiguous, writable float32 (torch warns of read-only memory)."""
    if x.ndim != 2:
        raise ModeclipError(f"{name} must have 2 dimensions (rows, features), got {x.ndim}: shape {x.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.require(x, np.float32, ["C", "W"])
        bad = [
            block.start + np.flatnonzero(~np.isfinite(rows[block]).all(1))
            for block in blocks(len(rows), ROWS_IN_MEMORY)
            if not np.isfinite(rows[block].sum())  # finite where all are, unless the sum itself is too large
        ]
    where = np.concatenate([np.empty(0, np.int64), *bad])
    if where.size:
        raise ModeclipError(
            f"{name} has NaN or infinite values in {where.size} of {len(rows)} rows, the first is row {where[0]}: "
            "remove or recompute these rows"
        )
    return rows


def blocks(num_rows: int, block_rows: int) -> Iterator[slice]:
    """Yield slices that cut rows into blocks."""
    for first in range(0, num_rows, block_rows):
        yield slice(first, min(first + block_rows, num_rows))


def for_each_block(num_rows: int, block_rows: int, work: Callable[[slice], None], device: str | torch.device) -> None:
    """Call ``work`` for every block: on a CPU one block to a thread, each with a torch of one thread.

    Faster than one block on all threads: no waiting for each other after every operation, however small.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or num_rows <= block_rows or torch.device(device).type != "cpu":
        for block in blocks(num_rows, block_rows):
            work(block)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, blocks(num_rows, block_rows)):
                pass
    finally:
        torch.set_num_threads(threads)  # of this thread it is unchanged; later threads start with the last one set


def has_fast_bfloat16(device: str) -> bool:
    """Return whether bfloat16 products are fast there and summed in float32.

    Not on CUDA, where sums may be rounded to bfloat16 on the way, and not on processors that only emulate it.
    """
    import torch

    if torch.device(device).type != "cpu" or not torch._C._has_mkldnn:
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


class Scorer:
    """Scores rows against all centres on a device: x.c - (|c|^2 + price) / 2, largest where the centre is cheapest.

    Rows and centres are taken relative to the mean of the centres, so that a common offset costs no precision.
    """

    def __init__(
        self, centers: Float[np.ndarray, "M D"], device: str, prices: Float[np.ndarray, " M"] | None = None
    ) -> None:
        import torch

        self.centers, self.device = centers, torch.device(device)
        self.block_rows = min(max(1, SCORES_IN_MEMORY // len(centers)), ROWS_IN_MEMORY)
        self.bfloat16 = has_fast_bfloat16(device)
        self.origin = torch.from_numpy(centers.mean(0, dtype=np.float64).astype(np.float32)).to(self.device)
        moved = torch.from_numpy(centers).to(self.device) - self.origin
        offset = moved.double().square().sum(1)
        if prices is not None:
            offset += torch.from_numpy(prices).to(self.device)
        offset *= -0.5
        self._largest = 1.001 * float(torch.linalg.vector_norm(moved, dim=1).max())
        self._largest_offset = float(offset.abs().max())
        self.height = GROUP if len(centers) >= SMALLEST_GROUPED else 1
        missing = -len(centers) % self.height
        moved = torch.nn.functional.pad(moved, (0, 0, 0, missing))
        offset = torch.nn.functional.pad(offset, (0, missing), value=-3e38)  # never nearest
        self._matrix, self._offset = moved.T, offset.float()
        if self.bfloat16:
            rounded = moved.bfloat16()
            self._residual = float(torch.linalg.vector_norm(moved - rounded.float(), dim=1).max())
            tail = []
            for _ in range(3):  # three bfloat16 numbers hold what one float32 does
                tail.append(offset.bfloat16())
                offset = offset - tail[-1].double()
            self._rounded = torch.cat([rounded, torch.stack(tail, 1)], dim=1).T

    def moved(self, rows: Float[np.ndarray, "B D"]) -> torch.Tensor:
        """Return rows relative to the origin of the scores, on the device."""
        import torch

        return torch.from_numpy(rows).to(self.device) - self.origin

    def scores(self, moved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scores, (B, M rounded up to a multiple of ``height``), and the rows if they were rounded."""
        import torch

        if not self.bfloat16 or moved.numel() * len(self.centers) < BFLOAT16_WORK:
            return torch.addmm(self._offset, moved, self._matrix), None
        rounded = torch.ones((len(moved), len(self._rounded)), dtype=torch.bfloat16)
        rounded[:, : moved.shape[1]] = moved
        return rounded @ self._rounded, rounded[:, : moved.shape[1]]

    def costs(self, rows: Float[np.ndarray, "B D"]) -> torch.Tensor:
        """Return the (B, M) squared distances plus prices, float32."""
        import torch

        moved = self.moved(rows)
        scores = torch.addmm(self._offset, moved, self._matrix)[:, : len(self.centers)]
        return (moved.square().sum(1, keepdim=True) - 2 * scores).clamp_(min=0)

    def certain(self, moved: torch.Tensor, rounded: torch.Tensor | None, best: torch.Tensor) -> torch.Tensor:
        """Return the (B,) score below which no centre can be nearer than the one whose score is ``best``.

        With x = x' + r and c = c' + q (what is multiplied, and what rounding took away) |x.c - x'.c'| is at most
        |r||c| + |x'||q|; the sum of D products in float32 is off by at most D units of |x||c|, twice that is allowed
        for; a stored score is off by one unit of itself. Both scores of a pair are off, hence the factors of two.
        """
        import torch

        norms = torch.linalg.vector_norm(moved, dim=1) * 1.001
        width = moved.shape[1] + 16
        error = width * 2.0**-23 * (norms * self._largest + self._largest_offset)
        error += width * 2.0**-124 * (1 + norms + self._largest)  # denormal numbers may be taken for zero
        unit = 0.0
        if rounded is not None:
            unit = 1.02 * BFLOAT16_UNIT
            lost = torch.linalg.vector_norm(moved - rounded, dim=1)
            error += 1.001 * (lost * self._largest + 1.01 * norms * self._residual)
        elif _reduced_products(self.device):
            error += 2.02 * BFLOAT16_UNIT * norms * self._largest
        limit: torch.Tensor = best - 2 * error - 2 * unit * (best.abs() + 2 * error)
        return limit


def _reduced_products(device: torch.device) -> bool:
    """Return whether the user lets torch round the factors of float32 products there, to TF32 or bfloat16."""
    import torch

    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("none", "ieee")


def _nearest_block(rows: Float[np.ndarray, "B D"], scorer: Scorer) -> Int[np.ndarray, " B"]:
    """Return the exact nearest centre of the rows of one block, the lowest index on a tie."""
    if len(scorer.centers) == 1:
        return np.zeros(len(rows), np.int64)
    pairs = _near_ties(scorer, scorer.moved(rows))
    if pairs is None:
        half = len(rows) // 2
        return np.concatenate([_nearest_block(rows[:half], scorer), _nearest_block(rows[half:], scorer)])
    row, center = pairs
    index = np.zeros(len(rows), np.int64)
    index[row] = center
    unsure = np.bincount(row, minlength=len(rows))[row] > 1
    row, center = row[unsure], center[unsure]
    exact = _pair_distances(rows, scorer.centers, row, center)
    order = np.lexsort((center, exact, row))
    some, first = np.unique(row[order], return_index=True)
    index[some] = center[order][first]
    return index


def _near_ties(scorer: Scorer, moved: torch.Tensor) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]] | None:
    """Return all (row, centre) that can be nearest, rows ascending; None: too many for one block.

    Comparisons are turned round so that a score that overflowed (NaN) rules nothing out.
    """
    import torch

    scores, rounded = scorer.scores(moved)
    scores = scores.view(len(moved), scorer.height, -1)
    tops = scores.amax(1).float()
    limit = scorer.certain(moved, rounded, tops.amax(1))
    row, group = torch.nonzero(~(tops < limit[:, None]), as_tuple=True)
    if len(row) * scorer.height > PAIRS_IN_MEMORY and len(moved) > 1:
        return None
    pair, place = torch.nonzero(~(scores[row, :, group].float() < limit[row, None]), as_tuple=True)
    center = place * scores.shape[2] + group[pair]
    real = center < len(scorer.centers)
    return row[pair][real].cpu().numpy(), center[real].cpu().numpy()


def _pair_distances(
    rows: Float[np.ndarray, "B D"],
    centers: Float[np.ndarray, "M D"],
    row: Int[np.ndarray, " P"],
    center: Int[np.ndarray, " P"],
) -> Float[np.ndarray, " P"]:
    """Return float64 squared distances of (row, centre) pairs."""
    import torch

    out = np.empty(len(row))
    x, points = torch.from_numpy(rows), torch.from_numpy(centers)
    first, second = torch.from_numpy(row), torch.from_numpy(center)
    for block in blocks(len(row), ROWS_IN_MEMORY):
        difference = x[first[block]].double().sub_(points[second[block]])
        out[block] = difference.square_().sum(1).numpy()
    return out


def squared_distances(
    x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], assignment: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Return the squared distance of each row to its centre, from differences: no cancellation near zero."""
    import torch

    out = np.empty(len(x), np.float32)
    points, index = torch.from_numpy(centers), torch.from_numpy(assignment)
    for block in blocks(len(x), ROWS_IN_MEMORY):
        difference = points[index[block]].sub_(torch.from_numpy(x[block]))
        out[block] = difference.square_().sum(1).numpy()
    return out


def two_cheapest(
    x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], prices: Float[np.ndarray, " M"], device: str
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Return each row's cheapest and second cheapest of two or more centres, and how much dearer the second is.

    The cost of a centre is the squared distance plus its price. Not exact: near ties fall as the low precision has it.
    """
    scorer = Scorer(centers, device, prices)
    first, second = np.empty((2, len(x)), np.int64)
    margin = np.empty(len(x), np.float32)

    def work(block: slice) -> None:
        scores = scorer.scores(scorer.moved(x[block]))[0][:, : len(centers)].float()
        best, choice = scores.max(1)
        other, next_choice = scores.scatter_(1, choice[:, None], -np.inf).max(1)
        first[block], second[block] = choice.cpu().numpy(), next_choice.cpu().numpy()
        margin[block] = (2 * (best - other)).cpu().numpy()

    for_each_block(len(x), scorer.block_rows, work, device)
    return first, second, margin
