"""DOC."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from modeclip.distances import ROWS_IN_MEMORY, Scorer, blocks, squared_distances

CANDIDATES = 32
"""Centres that a row of the auction keeps in view."""
FIRST_STEP = 0.02
"""Smallest raise of a bid in the first auction, as a fraction of the mean squared distance to the nearest centre."""
MAX_GAP = 0.002
"""Largest proven distance from the optimal balanced assignment, as a fraction of its objective."""
MAX_AUCTIONS = 5
"""Auctions with an ever smaller step before the best solution so far is taken."""
MAX_ROUNDS = 20_000
"""Rounds of bidding before the last rows are placed greedily (many equal rows, capacity without slack)."""


class _Offers:
    """For each row its cheapest centres at some prices, and a price-inclusive cost that no other centre is below.

    Prices only rise during an auction, so a row whose second choice is still below its ``bound`` has seen all that
    matters; the others look at all centres again (`refresh`).
    """

    def __init__(self, x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], device: str) -> None:
        self.x, self.scorer = x, Scorer(centers, device)
        self.num_centers, self.width = len(centers), min(CANDIDATES, len(centers))
        self.squares = np.einsum("nd,nd->n", x, x)
        self.center = np.empty((len(x), self.width), np.int64)
        self.cost = np.empty((len(x), self.width), np.float32)
        self.bound = np.empty(len(x))
        self.refresh(np.arange(len(x)), np.zeros(self.num_centers))

    def refresh(self, rows: Int[np.ndarray, " B"], prices: Float[np.ndarray, " M"]) -> None:
        """Choose the centres in view anew, at the prices of now."""
        import torch

        width = min(self.width + 1, self.num_centers)
        offset = torch.from_numpy(prices.astype(np.float32)).to(self.scorer.device)
        for block in blocks(len(rows), self.scorer.block_rows):
            some = rows[block]
            scores = self.scorer.scores(self.x[some])
            values, center = (scores + offset).topk(width, largest=False)
            center = center[:, : self.width]
            cost = scores.gather(1, center).cpu().numpy() + self.squares[some, None]
            self.center[some], self.cost[some] = center.cpu().numpy(), np.maximum(cost, 0)
            if width > self.width:
                self.bound[some] = values[:, -1].cpu().numpy() + self.squares[some]
            else:
                self.bound[some] = np.inf

    def best_two(
        self, rows: Int[np.ndarray, " B"], prices: Float[np.ndarray, " M"]
    ) -> tuple[Int[np.ndarray, " B"], Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """Return each row's cheapest centre at these prices, its cost with price, and the second cheapest cost."""
        total = self.cost[rows] + prices[self.center[rows]]
        second = np.partition(total, 1, axis=1)[:, 1]
        stale = np.flatnonzero(second > self.bound[rows])
        if stale.size:
            self.refresh(rows[stale], prices)
            total[stale] = self.cost[rows[stale]] + prices[self.center[rows[stale]]]
            second = np.partition(total, 1, axis=1)[:, 1]
        choice = total.argmin(1)
        everyone = np.arange(len(rows))
        return self.center[rows, choice], total[everyone, choice], second

    def costs(self, row: int) -> Float[np.ndarray, " M"]:
        """Return the squared distances of one row to all centres."""
        return self.scorer.scores(self.x[row : row + 1])[0].cpu().numpy() + self.squares[row]

    def scale(self) -> float:
        """Return the mean cost of the nearest centre, or where that is 0 a small part of the mean cost of all."""
        nearest = float(self.cost.min(1).mean(dtype=np.float64))
        return max(nearest, 1e-3 * float(self.cost.mean(dtype=np.float64)), 1e-30)

    def lower_bound(self, prices: Float[np.ndarray, " M"], capacity: int) -> float:
        """Return what no assignment within the capacity can cost less than: the dual objective at these prices."""
        total = 0.0
        for block in blocks(len(self.x), ROWS_IN_MEMORY):
            cheapest = (self.cost[block] + prices[self.center[block]]).min(1)
            total += float(np.minimum(cheapest, self.bound[block]).sum())
        return total - capacity * float(prices.sum())


def assign_balanced(
    x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], capacity: int, *, device: str = "cpu"
) -> Int[np.ndarray, " N"]:
    """Assign rows to centres at the least total squared distance with at most ``capacity`` rows to a centre.

    Args:
        x: Rows, finite float32, C-contiguous.
        centers: Centres, the same.
        capacity: Most rows of a centre; ``capacity * M`` is at least N.
        device: Torch device of the distance products.

    Returns:
        Centre of each row; its cost is within ``MAX_GAP`` of the optimum, unless ``MAX_AUCTIONS`` did not reach that.
    """
    assert capacity * len(centers) >= len(x), "no assignment can respect the capacity"
    offers = _Offers(x, centers, device)
    step = FIRST_STEP * offers.scale()
    best, best_cost, bound = np.empty(0, np.int64), np.inf, -np.inf
    for _ in range(MAX_AUCTIONS):
        assignment, prices = _auction(offers, capacity, step)
        cost = float(squared_distances(x, centers, assignment).sum(dtype=np.float64))
        bound = max(bound, offers.lower_bound(prices, capacity))
        if cost < best_cost:
            best, best_cost = assignment, cost
        if best_cost - bound <= MAX_GAP * best_cost:
            break
        step /= 4
    return best


def _auction(
    offers: _Offers, capacity: int, step: float, prices=None
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " M"]]:
    """Let rows bid for centres until all have one; return the assignment and the prices.

    Invariant: a row's centre costs it, with price, at most ``step`` more than its cheapest; a centre with a price is
    full. So the total is at most N * step above the optimum, and in practice far less.
    """
    num_rows, num_centers = offers.center.shape[0], offers.num_centers
    assignment = np.full(num_rows, num_centers)  # num_centers stands for: no centre
    bids, prices = np.zeros(num_rows), np.zeros(num_centers) if prices is None else prices.copy()
    waiting = np.arange(num_rows)
    for _ in range(MAX_ROUNDS):
        choice, first, second = offers.best_two(waiting, prices)
        bids[waiting] = prices[choice] + (second - first) + step
        assignment[waiting] = choice
        sizes = np.bincount(assignment, minlength=num_centers)
        contested = np.zeros(num_centers + 1, bool)
        contested[choice] = True
        contested[:-1] &= sizes[:num_centers] >= capacity
        rows = np.flatnonzero(contested[assignment])
        rows = rows[np.lexsort((-bids[rows], assignment[rows]))]
        centers = np.flatnonzero(contested)
        start = np.searchsorted(assignment[rows], centers)
        rank = np.arange(len(rows)) - np.repeat(start, sizes[centers])
        prices[centers] = bids[rows[start + capacity - 1]]
        waiting = rows[rank >= capacity]
        assignment[waiting] = num_centers
        if waiting.size == 0:
            return assignment, prices
    return _fill(offers, assignment, prices, capacity), prices


def _fill(
    offers: _Offers, assignment: Int[np.ndarray, " N"], prices: Float[np.ndarray, " M"], capacity: int
) -> Int[np.ndarray, " N"]:
    """Put each row that is still without a centre where it is nearest and there is room."""
    room = capacity - np.bincount(assignment, minlength=offers.num_centers + 1)[: offers.num_centers]
    for row in np.flatnonzero(assignment == offers.num_centers):
        cost = offers.costs(row)
        choice = int(np.where(room > 0, cost, np.inf).argmin())
        assignment[row] = choice
        room[choice] -= 1
    return assignment
