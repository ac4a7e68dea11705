"""Assigns rows to centres at the least total cost when no centre may have more than a given number of rows.

Method: this is a transportation problem, solved by an auction. Every row without a centre bids for the centre that is
cheapest for it (squared distance + price). A full centre keeps its highest bids, the lowest of them becomes its price,
and the rows that lost bid again. The prices also give a lower bound on the cost of every possible assignment (linear
programming duality), so each solution comes with how far from optimal it can be at most; auctions are repeated with
smaller steps of the bids until that is below ``MAX_GAP``. Equal rows that are more than a centre may have bid together
(`_Crowd`). A row only looks at the few centres that are cheapest for
it, and at all of them again when prices have outgrown that list.

While centres still move no such proof is needed: `adjust` only moves the prices that rows choose at.

Source: Bertsekas and Castanon 1989, "The auction algorithm for the transportation problem". Here all waiting rows bid
at once, every auction starts from prices of zero (which makes the bound tight where capacity is left over), and the
lists of candidates are ours.

Price: two products of (N, D) with (M, D) and some hundred rounds over few rows; 400 bytes a row. An exact minimum-cost
flow reaches the same objective to within ``MAX_GAP`` at many times the price: ``benchmarks/kmeans_balanced.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.distances import ROWS_IN_MEMORY, Scorer, blocks, for_each_block, squared_errors

CANDIDATES = 32
"""Centres that a row of the auction keeps in view."""
FIRST_STEP = 0.05
"""Smallest raise of a bid in the first auction, as a fraction of the mean cost of the nearest centre."""
FIRST_STEP_OF_SEEN = 0.002
"""What is added to it, as a fraction of the mean cost of all centres in view. It matters where rows lie on centres."""
RAISE = 1.1
"""How far `adjust` raises a price, as a multiple of the raise that would bring the centre down to its capacity, because
its neighbours raise theirs too. With ``DROP`` the best pair of those tried on captions; the worst pair had an objective
0.7 % higher."""
DROP = 0.1
"""How far `adjust` lowers a price, as a multiple of the drop that would fill the centre; a larger drop floods it."""
MAX_GAP = 0.002
"""How much an assignment may be proven to cost above the optimum, as a fraction of its own cost."""
MAX_AUCTIONS = 4
"""Auctions, each with a smaller step, after which the best solution so far is taken."""
MAX_ROUNDS = 10_000
"""Most rounds of all auctions of an assignment together; then the rows that are left are placed greedily. This happens
where many rows are nearly equal, which outbid each other one step at a time."""


@dataclass(frozen=True, eq=False)
class _Crowd:
    """Equal rows that are more than fit at one centre, and bid together.

    Alone, each would outbid an equal at another centre by one step, who would then do the same: as many rounds as
    there are equals, to raise their prices by one step.
    """

    rows: Int[np.ndarray, " n"]
    costs: Float[np.ndarray, " M"]

    def bid(
        self,
        waiting: Int[np.ndarray, " n"],
        holders: Int[np.ndarray, "M capacity"],
        held: Float[np.ndarray, "M capacity"],
        step: float,
    ) -> Int[np.ndarray, " lost"]:
        """Give the cheapest places to those who wait; return the rows that lost them.

        All places of the crowd are worth to it what the next one costs, so it bids that much and a step for each.
        """
        own = np.isin(holders, self.rows)
        cost = np.where(own, np.inf, self.costs[:, None] + np.maximum(held, 0)).ravel()
        cheapest = np.argpartition(cost, min(len(waiting), cost.size - 1))
        center, place = np.divmod(cheapest[: len(waiting)], holders.shape[1])
        lost = holders[center, place]
        holders[center, place], own[center, place] = waiting, True
        next_cost = cost[cheapest[len(waiting) :]].min(initial=np.inf)
        if next_cost == np.inf:  # all places are the crowd's now
            next_cost = cost[cheapest[: len(waiting)]].max()
        lines = np.flatnonzero(own.any(1))
        worth = np.maximum(held[lines], next_cost + step - self.costs[lines, None])
        bids = np.where(own[lines], worth, held[lines])
        order = np.argsort(-bids, axis=1, kind="stable")
        held[lines] = np.take_along_axis(bids, order, axis=1)
        holders[lines] = np.take_along_axis(holders[lines], order, axis=1)
        return lost[lost >= 0]


class _Offers:
    """Remembers for each row its cheapest centres, and a ``bound``: no other centre costs less than it, price included.

    Prices only rise during an auction. So a row whose second choice costs less than its bound has seen all centres that
    matter; the other rows look at all centres again (`refresh`).
    """

    def __init__(
        self, x: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "M D"], capacity: int, device: str
    ) -> None:
        self.x, self.scorer = x, Scorer(centers, device)
        self.num_centers, self.width = len(centers), min(CANDIDATES, len(centers))
        self.center = np.empty((len(x), self.width), np.int64)
        self.cost = np.empty((len(x), self.width), np.float32)
        self.bound = np.empty(len(x))
        self.refresh(np.arange(len(x)), np.zeros(self.num_centers))
        self.crowds = [_Crowd(rows, self.costs(int(rows[0]))) for rows in _equal_rows(x, capacity)]
        self.crowd_of_row = np.full(len(x), -1)
        for number, crowd in enumerate(self.crowds):
            self.crowd_of_row[crowd.rows] = number

    def refresh(self, rows: Int[np.ndarray, " B"], prices: Float[np.ndarray, " M"]) -> None:
        """Look at all centres again for some rows, and keep the cheapest ones at these prices."""
        import torch

        width = min(self.width + 1, self.num_centers)
        offset = torch.from_numpy(prices.astype(np.float32)).to(self.scorer.device)

        def work(block: slice) -> None:
            some = rows[block]
            cost = self.scorer.costs(self.x[some])
            values, center = (cost + offset).topk(width, largest=False)
            center = center[:, : self.width]
            self.center[some], self.cost[some] = center.cpu().numpy(), cost.gather(1, center).cpu().numpy()
            self.bound[some] = values[:, -1].cpu().numpy() if width > self.width else np.inf

        for_each_block(len(rows), self.scorer.block_rows, work, self.scorer.device)

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
        return np.asarray(self.scorer.costs(self.x[row : row + 1])[0].cpu().numpy())

    def first_step(self) -> float:
        """Return the least raise of a bid in the first auction: small beside the costs, but not beside their spread."""
        nearest, seen = (float(cost.mean(dtype=np.float64)) for cost in (self.cost.min(1), self.cost))
        return max(FIRST_STEP * nearest + FIRST_STEP_OF_SEEN * seen, 1e-30)

    def lower_bound(self, prices: Float[np.ndarray, " M"], capacity: int) -> float:
        """Return what every assignment within the capacity costs at least: the dual objective at these prices."""
        total = 0.0
        for block in blocks(len(self.x), ROWS_IN_MEMORY):
            cheapest = (self.cost[block] + prices[self.center[block]]).min(1)
            total += float(np.minimum(cheapest, self.bound[block])[self.crowd_of_row[block] < 0].sum())
        for crowd in self.crowds:  # which has seen all centres
            total += len(crowd.rows) * float((crowd.costs + prices).min())
        return total - capacity * float(prices.sum())


def assign_balanced(
    x: Float[np.ndarray, "N D"],
    centers: Float[np.ndarray, "M D"],
    capacity: int,
    *,
    device: str = "cpu",
) -> Int[np.ndarray, " N"]:
    """Assign rows to centres at the least total squared distance when a centre has room for ``capacity`` rows.

    Args:
        x: Rows, finite float32, C-contiguous.
        centers: Centres, finite float32, C-contiguous.
        capacity: Most rows of a centre; ``capacity * M`` must be at least N.
        device: Torch device of the distance products.

    Returns:
        Centre of each row. The total is within ``MAX_GAP`` of the optimum, unless ``MAX_AUCTIONS`` were too few.
    """
    assert capacity * len(centers) >= len(x), "no assignment can respect the capacity"
    if len(centers) == 1:
        return np.zeros(len(x), np.int64)
    offers = _Offers(x, centers, capacity, device)
    step = offers.first_step()
    best, best_cost, bound, rounds_left = np.empty(0, np.int64), np.inf, -np.inf, MAX_ROUNDS
    for _ in range(MAX_AUCTIONS):
        assignment, prices, rounds = _auction(offers, capacity, step, rounds_left)
        _fill(offers, assignment, capacity)
        cost = float(squared_errors(x, centers, assignment).sum(dtype=np.float64))
        for overshoot in (0, step):  # a last bid is up to one step higher than it had to be
            bound = max(bound, offers.lower_bound(np.maximum(prices - overshoot, 0), capacity))
        if cost < best_cost:
            best, best_cost = assignment, cost
        rounds_left -= rounds
        step /= 4
        if best_cost - bound <= MAX_GAP * best_cost or rounds_left < 4 * rounds:  # a quarter of the step: more rounds
            break
    return best


def adjust(
    prices: Float[np.ndarray, " M"],
    first: Int[np.ndarray, " N"],
    second: Int[np.ndarray, " N"],
    margin: Float[np.ndarray, " N"],
    capacity: float,
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " M"]]:
    """Return an assignment that is closer to the capacity than the rows' first choices, and prices for the next one.

    From a centre that is too full, the rows that lose least by it go to their second choice, and the price rises by
    about as much as would make them go. The price of a centre with room falls by a part of what would make enough rows
    come.

    Args:
        prices: Prices that the rows chose at.
        first: Each row's cheapest centre.
        second: Its second cheapest centre.
        margin: How much more the second one costs.
        capacity: Most rows of a centre; for a sample of the rows, that times the sampled share.
    """
    num_centers, everyone = len(prices), np.arange(len(first))
    sizes = np.bincount(first, minlength=num_centers)
    order = np.lexsort((margin, first))
    start = np.concatenate([[0], np.cumsum(sizes)])
    surplus = np.maximum(np.ceil(sizes - capacity), 0).astype(np.int64)
    leaves = order[everyone - start[first[order]] < surplus[first[order]]]
    assignment = first.copy()
    assignment[leaves] = second[leaves]
    changed = prices.copy()
    full = np.flatnonzero(surplus)
    changed[full] += RAISE * margin[order[start[full] + surplus[full] - 1]]

    order = np.lexsort((margin, second))
    suitors = np.bincount(second, minlength=num_centers)
    start = np.concatenate([[0], np.cumsum(suitors)])
    room = np.flatnonzero((sizes < capacity) & (prices > 0))
    wanted = np.minimum(np.ceil(capacity - sizes[room]).astype(np.int64), suitors[room])
    last = order[np.minimum(start[room] + np.maximum(wanted, 1), len(order)) - 1]
    changed[room] -= np.where(wanted > 0, DROP * margin[last], prices[room])
    return assignment, np.maximum(changed, 0)


def _auction(
    offers: _Offers, capacity: int, step: float, max_rounds: int
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " M"], int]:
    """Let rows bid until each has a place, or rounds run out; return the assignment (M: no place), prices and rounds.

    Invariants: with its price, a row's centre costs at most ``step`` more than the cheapest one, and a centre with a
    price is full. So the total is at most N * step above the optimum, and in practice much closer.
    """
    num_centers = offers.num_centers
    holders = np.full((num_centers, capacity), -1)  # rows at each centre, highest bid first; -1: room
    held = np.full((num_centers, capacity), -np.inf)
    prices = np.zeros(num_centers)
    waiting = np.arange(len(offers.x))
    rounds = 0
    while waiting.size and rounds < max_rounds:
        rounds += 1
        crowded = waiting[:0]
        if offers.crowds:
            waiting, crowded = _bid_together(offers, waiting, holders, held, step)
            prices = np.maximum(held[:, -1], 0)
        choice, first, second = offers.best_two(waiting, prices)
        bids = prices[choice] + (second - first) + step
        order = np.lexsort((-bids, choice))
        waiting, choice, bids = waiting[order], choice[order], bids[order]
        hit, start, counts = np.unique(choice, return_index=True, return_counts=True)
        rank = np.arange(len(choice)) - np.repeat(start, counts)
        heard = rank < capacity  # lower bids at the same centre cannot win
        line, column = np.repeat(np.arange(len(hit)), counts)[heard], rank[heard]
        offered = np.full((len(hit), column.max(initial=0) + 1), -1)
        offered_bids = np.full(offered.shape, -np.inf)
        offered[line, column], offered_bids[line, column] = waiting[heard], bids[heard]
        rows = np.concatenate([holders[hit], offered], axis=1)
        rows_bids = np.concatenate([held[hit], offered_bids], axis=1)
        ranking = np.argsort(-rows_bids, axis=1, kind="stable")
        rows = np.take_along_axis(rows, ranking, axis=1)
        rows_bids = np.take_along_axis(rows_bids, ranking, axis=1)
        holders[hit], held[hit] = rows[:, :capacity], rows_bids[:, :capacity]
        prices[hit] = np.maximum(rows_bids[:, capacity - 1], 0)  # -inf while there is room
        lost = rows[:, capacity:]
        waiting = np.concatenate([waiting[~heard], lost[lost >= 0], crowded])
    assignment = np.full(len(offers.x), num_centers)
    center, place = np.nonzero(holders >= 0)
    assignment[holders[center, place]] = center
    return assignment, prices, rounds


def _bid_together(
    offers: _Offers,
    waiting: Int[np.ndarray, " n"],
    holders: Int[np.ndarray, "M capacity"],
    held: Float[np.ndarray, "M capacity"],
    step: float,
) -> tuple[Int[np.ndarray, " alone"], Int[np.ndarray, " crowded"]]:
    """Let each crowd of which rows wait bid once; return who waits then: rows that bid alone, and rows of crowds."""
    crowd = offers.crowd_of_row[waiting]
    left = [waiting[crowd < 0]]
    for number in np.unique(crowd[crowd >= 0]).tolist():
        left.append(offers.crowds[number].bid(waiting[crowd == number], holders, held, step))
    waiting = np.concatenate(left)
    is_crowded = offers.crowd_of_row[waiting] >= 0
    return waiting[~is_crowded], waiting[is_crowded]


def _equal_rows(x: Float[np.ndarray, "N D"], capacity: int) -> list[Int[np.ndarray, " n"]]:
    """Return the rows of each value that more than ``capacity`` rows have, equal by a hash of 64 bits."""
    factors = np.random.default_rng(0).integers(0, 1 << 64, x.shape[1], dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(x), np.uint64)
    for block in blocks(len(x), ROWS_IN_MEMORY):
        hashes[block] = (x[block].view(np.uint32) * factors).sum(1, dtype=np.uint64)
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return [np.flatnonzero(group == value) for value in np.flatnonzero(counts > capacity)]


def _fill(offers: _Offers, assignment: Int[np.ndarray, " N"], capacity: int) -> None:
    """Put each row that is still without a centre into the nearest one that has room."""
    room = capacity - np.bincount(assignment, minlength=offers.num_centers + 1)[: offers.num_centers]
    for row in np.flatnonzero(assignment == offers.num_centers).tolist():
        choice = int(np.where(room > 0, offers.costs(row), np.inf).argmin())
        assignment[row] = choice
        room[choice] -= 1
