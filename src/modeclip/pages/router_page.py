"""The page of a CLIP-MoE's routers: which tokens, words and topics each expert gets.

Pictures have their patches in the colour of the expert that they choose first, and captions their tokens, in some
blocks of each tower; a heat map has the share of tokens by expert and block. What is counted is in
`modeclip.adapting.tracing`. Digits stand beside colours wherever there is room, so that nobody has to tell colours
apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.adapting.tracing import BlockTrace, Trace, TracedPair
from modeclip.pages.html import embed_picture, write_page

Json = dict[str, Any]

PAGE_FILE = "router.html"
SHOWN_BLOCKS = 4
"""Blocks of a tower that are shown token by token: the first, the last, and some between."""
CELL = 100
"""Side of a picture in the units of its drawing; all pictures are drawn as squares, as towers see them."""
GAP = 6
"""Room between pictures."""
MOST_DIGITS = 8
"""Patches in a row up to which their experts' numbers are written on them."""
IDLE = 0.01
"""Share of a block's tokens below which an expert counts as idle there."""


def write_routers(trace: Trace, folder: Path | str, *, name: str = "") -> Path:
    """Write ``router.html`` to a folder and return its path; an existing page is replaced as a whole.

    Args:
        trace: What `modeclip.adapting.tracing.trace` returned.
        folder: The folder; it is made if it is missing.
        name: Heading of the page; the name of the model's folder by default.
    """
    towers = {tower: [block for block in trace.blocks if block.tower == tower] for tower in ("image", "text")}
    shown = {tower: _spread(len(blocks)) for tower, blocks in towers.items()}
    return write_page(
        Path(folder) / PAGE_FILE,
        "router.html",
        name=name or Path(trace.model).name,
        trace=trace,
        num_experts=len(trace.experts),
        towers=towers,
        shown=shown,
        means={tower: np.mean([block.first for block in blocks], axis=0).tolist() for tower, blocks in towers.items()},
        balance=float(np.mean([block.balance for block in trace.blocks])),
        idle=_idle(trace.blocks),
        pairs=[_draw_pair(pair, shown) for pair in trace.shown],
        examples=[
            [
                embed_picture(pair.picture, pair.caption, place=f"row {pair.row:,}, key {pair.key}")
                for pair in expert.pairs
            ]
            for expert in trace.experts
        ],
        topics=[
            {"topic": topic, "towers": [_lifts(topic, trace, tower) for tower in ("image", "text")]}
            for topic in trace.topics
        ],
        favourites=[_favourites(trace, number) for number in range(len(trace.experts))],
    )


def _spread(count: int) -> list[int]:
    """Return which of some blocks are shown, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, SHOWN_BLOCKS)).tolist()})


def _idle(blocks: Sequence[BlockTrace]) -> list[tuple[str, int, int]]:
    """Return tower, block and expert wherever an expert is the first choice of hardly any token."""
    return [
        (block.tower, block.index, expert)
        for block in blocks
        for expert, share in enumerate(block.first.tolist())
        if share < IDLE
    ]


def _lifts(topic: Any, trace: Trace, tower: str) -> list[tuple[float, float]]:
    """Return each expert's share of a topic, and its difference to the share of all pairs."""
    shares = getattr(topic, tower).tolist()
    return [(share, share - getattr(expert, tower)) for share, expert in zip(shares, trace.experts, strict=True)]


def _favourites(trace: Trace, expert: int, most: int = 6) -> list[tuple[str, float]]:
    """Return the topics that an expert gets more of than of all pairs, and by how much, both towers together."""
    found = [
        (topic.name, sum(float(_lifts(topic, trace, tower)[expert][1]) for tower in ("image", "text")) / 2)
        for topic in trace.topics
    ]
    return sorted((item for item in found if item[1] > 0), key=lambda item: -item[1])[:most]


def _draw_pair(pair: TracedPair, shown: dict[str, list[int]]) -> Json:
    """Return what the template draws of a pair: the picture, its patches by block, and its tokens by block."""
    picture = embed_picture(pair.picture, pair.caption, place=f"row {pair.row:,}, key {pair.key}")
    views = [_draw_patches(pair.image[block], pair.picture.size) for block in shown["image"]]
    for place, view in enumerate(views, 1):
        view["x"] = place * (CELL + GAP)
    return picture | {
        "size": (CELL + len(views) * (CELL + GAP), CELL + (16 if any(view["before"] for view in views) else 0)),
        "views": views,
        "lines": [list(zip(pair.pieces, pair.text[block].tolist(), strict=False)) for block in shown["text"]],
        "words": "; ".join(f"block {block}: {_in_words(pair.image[block])}" for block in shown["image"]),
    }


def _draw_patches(experts: np.ndarray, size: tuple[int, int]) -> Json:
    """Place the patches of a picture: for each expert one path, and digits where they are large enough."""
    rows, columns = patch_grid(len(experts), size)
    before, grid = np.split(experts, [len(experts) - rows * columns])
    grid = grid.reshape(rows, columns)
    width, height = CELL / columns, CELL / rows
    paths: dict[int, list[str]] = {}
    for row, line in enumerate(grid.tolist()):
        start = 0
        for expert, run in groupby(line):
            length = len(list(run))
            paths.setdefault(expert, []).append(
                f"M{start * width:.4g} {row * height:.4g}h{length * width:.4g}v{height:.4g}h{-length * width:.4g}z"
            )
            start += length
    digits = [
        (round((column + 0.5) * width, 1), round((row + 0.5) * height, 1), expert)
        for row, line in enumerate(grid.tolist())
        for column, expert in enumerate(line)
        if columns <= MOST_DIGITS
    ]
    return {
        "paths": [(expert, "".join(paths[expert])) for expert in sorted(paths)],
        "digits": digits,
        "before": before.tolist(),
    }


def patch_grid(num_tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the largest grid of a picture's shape that its tokens can be; others come before it.

    Args:
        num_tokens: Tokens of the picture, with those of the class and registers.
        size: Width and height of the picture.

    Examples:
        >>> patch_grid(17, (32, 32)), patch_grid(16, (32, 32)), patch_grid(5 + 8 * 16, (448, 224))
        ((4, 4), (4, 4), (8, 16))
    """
    width, height = size
    for count in range(num_tokens, 0, -1):
        rows = round((count * height / width) ** 0.5)
        if rows and count % rows == 0 and abs(count / rows * height - rows * width) < max(size) / 2:
            return rows, count // rows
    return 1, num_tokens


def _in_words(experts: np.ndarray) -> str:
    """Return the share of a picture's tokens by expert, as a screen reader reads it."""
    counts = Counter(experts.tolist())
    return ", ".join(f"expert {expert} {100 * count / len(experts):.0f} %" for expert, count in sorted(counts.items()))
