"""The atlas of a clustering: its experts and fine clusters in pictures and captions, and what its choices are worth.

The map is that of a run's report: fine centres that are neighbours stay neighbours (t-SNE). Pictures are added until
their budget is spent: some for each expert first, then one for each fine cluster, largest first, then a second one,
and so on.

Price: some seconds for 1024 clusters, for their places on the map and for reading pictures. The page weighs as much as
the budget for pictures plus about a megabyte for 1024 clusters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.clustering.cards import FineCard
from modeclip.clustering.diagnostics import Diagnostics
from modeclip.clustering.fitting import ClusterResult
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.pages.charts import draw_histogram, draw_map, draw_trials, neighbour_plane
from modeclip.pages.html import embed_picture, write_page

Json = dict[str, Any]

PICTURE_BYTES = 4_000_000
"""Most bytes that all pictures together take in the page."""
PICTURES_OF_EXPERT = 20
"""Pictures shown for an expert, drawn in proportion to the sizes of its fine clusters."""
PICTURES_OF_FINE = 6
"""Most pictures shown for a fine cluster: the nearest and random rows in turn."""
PICTURES_AT_ONCE = 64
"""Pictures that are read from the catalog at once."""
CHART = (340.0, 210.0)
"""Size of a small chart in its own units."""


def write_atlas(
    catalog: Catalog,
    result: ClusterResult,
    path: Path | str,
    diagnostics: Diagnostics | None = None,
    *,
    name: str = "",
    picture_bytes: int = PICTURE_BYTES,
) -> Path:
    """Write the atlas of a clustering and return its path.

    Args:
        catalog: The catalog that was clustered. If its pictures cannot be read, the page says so.
        result: The clustering and its cards.
        path: The page; an existing one is replaced as a whole.
        diagnostics: What was found out about the clustering. Missing parts have no section.
        name: Heading of the page; the name of the catalog's folder by default.
        picture_bytes: Most bytes of all pictures together; 0 shows no pictures.
    """
    pictures, reason = take_pictures(catalog, result, picture_bytes)
    return write_page(
        Path(path),
        "atlas.html",
        name=name or catalog.name,
        num_experts=len(result.experts),
        num_rows=sum(card.size for card in result.fine),
        overlap=result.clustering.overlap,
        atlas=build_map(result),
        experts=build_experts(result, pictures),
        reason=reason,
        sizes=draw_histogram(np.array([card.size for card in result.fine], np.float64), size=(720.0, 210.0)),
        largest=max(card.size for card in result.fine),
        num_empty=sum(card.size == 0 for card in result.fine),
        diagnostics=diagnostics or Diagnostics(),
        sweeps=build_sweeps(diagnostics or Diagnostics()),
    )


def build_map(result: ClusterResult) -> Json:
    """Place all fine clusters on a plane on which neighbours stay neighbours."""
    shown = sorted(result.fine, key=lambda card: (-card.size, card.index))
    plane = neighbour_plane(result.clustering.fine_centers[[card.index for card in shown]])
    clusters = [
        {
            "index": card.index,
            "expert": card.expert,
            "size": card.size,
            "keywords": card.keywords,
            "nearest_captions": card.nearest_captions,
            "tasks": [],
        }
        for card in shown
    ]
    return {
        **draw_map(clusters, plane, smallest=2.0),
        "experts": result.experts,
        "imbalance": result.imbalance,
        "objective": result.objective,
    }


def build_experts(result: ClusterResult, pictures: dict[tuple[str, int], list[Json]]) -> list[Json]:
    """Collect for each expert its card, its pictures, and its own fine clusters, the largest first."""
    total = sum(card.size for card in result.fine)
    biggest = max(card.size for card in result.fine) or 1
    return [
        {
            "card": expert,
            "share": expert.size / max(total, 1),
            "pictures": pictures.get(("expert", expert.index), []),
            "fine": [
                {"card": card, "part": card.size / biggest, "pictures": pictures.get(("fine", card.index), [])}
                for card in sorted(result.fine, key=lambda card: (-card.size, card.index))
                if card.expert == expert.index
            ],
        }
        for expert in result.experts
    ]


def build_sweeps(diagnostics: Diagnostics) -> list[Json]:
    """Place the sweeps of K and M on small charts."""
    charts = {
        "experts": (("imbalance", "largest / mean", 1.0), ("mean_range", "mean range", None), _OBJECTIVE),
        "fine": (_OBJECTIVE, ("imbalance", "largest / mean", 1.0), ("seconds", "seconds", 0.0)),
    }
    sweeps = []
    for kind, fields in charts.items():
        trials = getattr(diagnostics, kind)
        numbers = [getattr(trial, f"num_{kind}") for trial in trials]
        placed = [
            {
                "words": words,
                **draw_trials(numbers, [getattr(trial, field) for trial in trials], size=CHART, low=low),
            }
            for field, words, low in fields
            if trials
        ]
        if placed:
            sweeps.append({"kind": kind, "charts": placed})
    return sweeps


_OBJECTIVE = ("objective", "objective", None)


def take_pictures(
    catalog: Catalog, result: ClusterResult, most_bytes: int
) -> tuple[dict[tuple[str, int], list[Json]], str]:
    """Read pictures of experts and fine clusters until their budget of bytes is spent.

    Returns:
        Pictures of ("expert", k) and ("fine", s), and the error that stopped the reading, if there was one.
    """
    pictures: dict[tuple[str, int], list[Json]] = {}
    spent = 0
    wanted = _wanted(result)
    while spent < most_bytes and (part := list(itertools.islice(wanted, PICTURES_AT_ONCE))):
        rows = np.array([row for _, row in part], np.int64)
        try:
            images, captions = catalog.images(rows), catalog.read(["caption"], rows)["caption"]
        except ModeclipError as error:
            return pictures, str(error)
        for (owner, _), image, caption in zip(part, images, captions, strict=True):
            if any(caption == known["caption"] for known in pictures.get(owner, [])):
                continue
            picture = embed_picture(image, str(caption))
            spent += len(picture["source"])
            if spent > most_bytes:
                return pictures, ""
            pictures.setdefault(owner, []).append(picture)
    return pictures, ""


def _wanted(result: ClusterResult) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield to whom a picture belongs, and its row, in the order in which pictures are added."""
    for expert in result.experts:
        own = [card for card in result.fine if expert.index in card.experts and card.random_rows]
        sizes = np.array([card.size for card in own], np.float64)
        if own:
            drawn = np.random.default_rng(expert.index).choice(len(own), PICTURES_OF_EXPERT, p=sizes / sizes.sum())
            rows = dict.fromkeys(own[i].random_rows[n % len(own[i].random_rows)] for n, i in enumerate(drawn.tolist()))
            yield from ((("expert", expert.index), row) for row in rows)
    shown = sorted(result.fine, key=lambda card: (-card.size, card.index))
    for position in range(PICTURES_OF_FINE):
        for card in shown:
            rows_of_card = _alternate(card)
            if position < len(rows_of_card):
                yield ("fine", card.index), rows_of_card[position]


def _alternate(card: FineCard) -> list[int]:
    """Return the nearest and the random rows of a card in turn, each row once."""
    pairs = itertools.zip_longest(card.nearest_rows, card.random_rows)
    return list(dict.fromkeys(row for pair in pairs for row in pair if row is not None))
