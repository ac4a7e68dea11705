"""Finds the nearest centres of rows, and measures how far away the centres are.

There are two kinds of callers, and each needs an arithmetic of its own:

- Clustering sends millions of rows to their one nearest centre, and only has to know which one that is: float32 in,
  `assign_nearest`. One low-precision product per block (bfloat16 where the processor multiplies it fast, else float32)
  scores all centres, relative to their mean. Rounding changes a score by no more than a bound that is proven
  (Cauchy-Schwarz over the rounding errors of the row and of the centres, plus those of the sum and of the stored
  score). Every centre that could be nearest within that bound, which is a single one for most rows, is then compared
  by float64 differences, and of equal centres the lowest index wins. So the answer is that of a brute-force search in
  float64, whatever the precision and the size of a block.
- Routing turns distances into weights, so it needs the numbers themselves, often to all centres, and the weights of a
  class must not depend on what else is asked in the same call: float64 throughout, `nearest_centers` and
  `squared_distance_blocks`, a few hundred rows at a time.

Price: the product of (N, D) with (M, D). `assign_nearest` takes several times as long as that in bfloat16, for the
search; its memory is the input, the output and one block for each thread (``benchmarks/kmeans_faiss.py`` compares it
with faiss). In float64 a million texts of 384 dimensions take one core 17 seconds for 1024 centres and 2 minutes for
8192 (``benchmarks/routing.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError

if TYPE_CHECKING:
    import torch

ArrayLike = Any
"""What `as_array` takes. Not `numpy.typing.ArrayLike`, which has no torch tensors, and no tuples when it is checked."""
SCORES_IN_MEMORY = 1 << 20
"""Entries of a block of the N x M score matrix, 2 MiB of bfloat16 or 4 MiB of float32: fast where it fits the cache."""
ROWS_IN_MEMORY = 1 << 11
"""Rows of a block where only N x D work is done; no block has more."""
PAIRS_IN_MEMORY = 1 << 20
"""Near ties of a block that are compared at once; a block with more of them is cut in two."""
GROUP = 16
"""Centres that share one maximum in the search for near ties, so that only a few groups are searched again."""
SMALLEST_GROUPED = 64
"""With fewer centres than this they are not searched in groups."""
BFLOAT16_WORK = 1 << 20
"""Fewest multiplications of a block for which bfloat16 pays."""
BFLOAT16_UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
MAX_DISTANCES = 1 << 22
"""Most float64 distances that are held at once: 32 MiB."""
MAX_ROWS = 256
"""Most rows whose float64 distances are held at once: with 1024 centres 2 MiB, which stay in the cache."""
ROUNDING = 1e-13
"""Relative difference of squared float64 distances below which two centres count as equally near."""


def as_array(name: str, values: ArrayLike) -> np.ndarray:
    """Return numbers as a numpy array, without a copy where they are one already.

    Args:
        name: What the caller calls them, for the message.
        values: Anything that `numpy.asarray` takes, and torch tensors of any device and type, which numpy refuses if
            they require a gradient, lie on a GPU or are bfloat16.

    Raises:
        ModeclipError: The values are ragged, or are not numbers.

    Examples:
        >>> as_array("x", [[1, 2], [3, 4]]).shape
        (2, 2)
    """
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    try:
        if torch is not None and isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            array: np.ndarray = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        else:
            array = np.asarray(values)
        if array.dtype.kind in "OV":  # objects that may be numbers; bfloat16 of other libraries
            array = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModeclipError(f"{name}: expected an array of numbers, got {type(values).__name__} ({reason})") from None
    if array.dtype.kind not in "biuf":
        raise ModeclipError(f"{name}: expected an array of numbers, got {type(values).__name__} of {array.dtype}")
    return array


def as_rows(name: str, values: ArrayLike) -> Float[np.ndarray, "N D"]:
    """Return a matrix as finite, contiguous, writable float32 (torch warns of memory that it may not write to).

    Raises:
        ModeclipError: The values are not a matrix of finite numbers with one column or more.
    """
    x = as_array(name, values)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ModeclipError(f"{name}: expected a matrix, rows of 1 number or more each, got shape {x.shape}")
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


def assign_nearest(
    x: ArrayLike, centers: ArrayLike, *, chunk_rows: int | None = None, device: str = "cpu"
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Assign each row to its nearest centre, and return the squared Euclidean distance to it too.

    The assignment is exact and does not depend on how many rows are asked about at once: low-precision products only
    narrow the choice. Where they cannot tell two centres apart float64 differences decide, and of equal centres the
    lowest index is taken.

    Args:
        x: Rows, (N, D); computed in float32.
        centers: One centre or more, (M, D).
        chunk_rows: Rows compared with all centres at a time; None: as many as keep a block of 4 MiB.
        device: Torch device of the distance products.

    Returns:
        Index of the nearest centre (int64) and squared distance (float32) of each row.

    Raises:
        ModeclipError: An input is not a matrix of finite numbers, or the two differ in width.

    Examples:
        >>> index, squared_distance = assign_nearest([[0.0, 3.0]], [[4.0, 3.0], [0.0, 1.0]])
        >>> index.tolist(), squared_distance.tolist()
        ([1], [4.0])
    """
    rows, points = as_rows("x", x), as_rows("centers", centers)
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
        squared[block] = squared_errors(rows[block], points, index[block])

    for_each_block(len(rows), chunk_rows or scorer.block_rows, work, device)
    return index, squared


def nearest_centers(
    embeddings: Float[np.ndarray, "L D"], centers: Float[np.ndarray, "M D"], count: int = 1
) -> tuple[Int[np.ndarray, "L n"], Float[np.ndarray, "L n"]]:
    """Find the nearest centres of each embedding, the nearest first, and their distances in float64.

    Of centres that are equally near, up to rounding, the one with the lowest index comes first.

    Args:
        embeddings: Rows of any floating type.
        centers: Centres of any floating type.
        count: How many centres are wanted; all of them if there are fewer.

    Examples:
        >>> index, distance = nearest_centers(np.array([[0.6]]), np.array([[0.0], [1.0], [1.5]]), 2)
        >>> index.tolist(), distance.round(3).tolist()
        ([[1, 0]], [[0.4, 0.6]])
    """
    count = min(count, len(centers))
    index, distance = np.empty((len(embeddings), count), dtype=np.int64), np.empty((len(embeddings), count))
    for rows, chunk, squared in squared_distance_blocks(embeddings, centers):
        if count == 1:
            index[rows, 0], distance[rows, 0] = nearest_of(chunk, squared, centers)
            continue
        room = ROUNDING * (squared + np.vecdot(chunk, chunk)[:, None])
        farthest = np.partition(squared + room, count - 1, axis=1)[:, count - 1]
        for row, x, near in zip(range(len(embeddings))[rows], chunk, squared - room <= farthest[:, None], strict=True):
            found = np.flatnonzero(near)
            gaps = np.linalg.norm(x - centers[found], axis=1)
            order = np.lexsort((found, gaps.round(12)))[:count]  # what differs by rounding only is equal
            index[row], distance[row] = found[order], gaps[order]
    return index, distance


def squared_distance_blocks(
    embeddings: Float[np.ndarray, "L D"], centers: Float[np.ndarray, "M D"]
) -> Iterator[tuple[slice, Float[np.ndarray, "B D"], Float[np.ndarray, "B M"]]]:
    """Yield the squared float64 distances of all embeddings to all centres, a block of embeddings at a time.

    Yields:
        Which embeddings the block has, these embeddings in float64, and their squared distances. The next block
        overwrites the distances, so copy what has to stay.
    """
    centers = centers.astype(np.float64)
    squared_norm, columns = np.vecdot(centers, centers), np.ascontiguousarray(-2 * centers.T)
    num_rows = max(1, min(MAX_ROWS, MAX_DISTANCES // len(centers)))
    buffer = np.empty((min(num_rows, len(embeddings)), len(centers)))  # memory that is new each time costs more
    for start in range(0, len(embeddings), num_rows):
        rows = slice(start, start + num_rows)
        chunk = embeddings[rows].astype(np.float64)
        squared = np.matmul(chunk, columns, out=buffer[: len(chunk)])
        squared += squared_norm
        squared += np.vecdot(chunk, chunk)[:, None]
        yield rows, chunk, np.maximum(squared, 0.0, out=squared)


def nearest_of(
    chunk: Float[np.ndarray, "B D"], squared: Float[np.ndarray, "B M"], centers: Float[np.ndarray, "M D"]
) -> tuple[Int[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """Return the nearest centre of each row of a block of `squared_distance_blocks`, and the distance to it."""
    least = squared.min(axis=1)
    # The matrix product rounds equal distances apart: what differs by rounding only is equal.
    limit = least + ROUNDING * (least + np.vecdot(chunk, chunk))
    index = (squared <= limit[:, None]).argmax(axis=1)
    return index, np.linalg.norm(chunk - centers[index], axis=1)


def blocks(num_rows: int, block_rows: int) -> Iterator[slice]:
    """Yield slices that cut rows into blocks."""
    for first in range(0, num_rows, block_rows):
        yield slice(first, min(first + block_rows, num_rows))


def for_each_block(num_rows: int, block_rows: int, work: Callable[[slice], None], device: str | torch.device) -> None:
    """Call ``work`` for every block: on a CPU each thread takes whole blocks, and torch uses one thread in each.

    That is faster than all threads on one block, which would wait for each other after every small operation.
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
    """Return whether a device multiplies bfloat16 fast and sums the products in float32.

    CUDA does not qualify, because it may round sums to bfloat16 on the way, nor do processors that emulate bfloat16.
    """
    import torch

    if torch.device(device).type != "cpu" or not torch._C._has_mkldnn:
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


class Scorer:
    """Scores rows against all centres on a device: x.c - (|c|^2 + price) / 2 is largest for the cheapest centre.

    Rows and centres are taken relative to the mean of the centres, so that a common offset costs no precision.

    Args:
        centers: Centres, finite float32.
        device: Torch device of the products.
        prices: What a centre costs on top of the squared distance; None: nothing.
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
    """Return whether the user lets torch round the factors of float32 products to TF32 or bfloat16 on this device."""
    import torch

    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("none", "ieee")


def _nearest_block(rows: Float[np.ndarray, "B D"], scorer: Scorer) -> Int[np.ndarray, " B"]:
    """Return the exact nearest centre of each row of a block, the lowest index on a tie."""
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
    """Return all (row, centre) pairs that can be nearest, rows ascending, or None if they are too many for one block.

    Comparisons are negated (not below the limit) so that a score that overflowed to NaN rules nothing out.
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


def squared_errors(
    x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], assignment: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Return the squared distance of each row to its own centre, by differences, which lose no digits near zero."""
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
    """Return the cheapest and the second cheapest centre of each row, and how much more the second one costs.

    A centre costs its squared distance plus its price; there are two centres or more. The choice is not exact: low
    precision decides between centres that cost nearly the same.
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
