"""A clustering in, one self-contained HTML page out: its experts, its fine clusters, and what its choices are worth.

Method: as in `modeclip.pages.run_report`: this file computes what is drawn, ``templates/atlas.html`` holds words and order; one
file, nothing is loaded, and the content security policy makes the browser refuse everything else. The map shows the
fine centres on their two main directions (PCA): straight distances, unlike the report's t-SNE, but only the share of
the variance that is stated beside it. Pictures are taken until a budget is spent: some for each expert first, then one
for each fine cluster, largest first, then a second one, and so on.

Price: a few seconds for 1024 clusters, nearly all of it reading pictures; the page weighs the pictures' budget and
about a megabyte for 1024 clusters.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.clustering.cards import FineCard
from modeclip.clustering.diagnostics import Diagnostics
from modeclip.clustering.fitting import ClusterResult
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.pages.charts import MAP_SIZE, choose_labels, draw_histogram, draw_trials, fit_box, principal_plane
from modeclip.pages.run_report import encode_image, format_count, format_duration, format_short, is_small, label
from modeclip.system.files import write_atomically

Json = dict[str, Any]

PICTURE_BYTES = 4_000_000
"""Most bytes of all pictures together, as they stand in the page."""
PICTURES_OF_EXPERT = 20
"""Pictures shown for an expert, drawn with chances in proportion to the sizes of its fine clusters."""
PICTURES_OF_FINE = 6
"""Most pictures of a fine cluster: nearest and random rows in turn."""
PICTURES_AT_ONCE = 64
"""Pictures read from the catalog together."""
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
    """Write the page of a clustering and return where it lies.

    Args:
        catalog: The catalog that the clustering was applied to; if its pictures cannot be read, the page says so.
        result: The clustering and its cards.
        path: The page; an existing one is replaced at once, never half-written.
        diagnostics: What was found out about the clustering; absent parts are left out.
        name: Heading of the page; the name of the catalog's folder by default.
        picture_bytes: Most bytes of all pictures together; 0: no pictures.
    """
    pictures, reason = take_pictures(catalog, result, picture_bytes)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = _render(
        name=name or catalog.name,
        num_experts=len(result.experts),
        num_rows=sum(card.size for card in result.fine),
        overlap=result.clustering.overlap,
        atlas=build_map(result),
        experts=build_experts(result, pictures),
        reason=reason,
        num_pictures=sum(len(group) for group in pictures.values()),
        sizes=draw_histogram(np.array([card.size for card in result.fine], np.float64), size=(720.0, 210.0)),
        largest=max(card.size for card in result.fine),
        num_empty=sum(card.size == 0 for card in result.fine),
        diagnostics=diagnostics or Diagnostics(),
        sweeps=build_sweeps(diagnostics or Diagnostics()),
    )
    write_atomically(path, page)
    return path


def build_map(result: ClusterResult) -> Json:
    """Place all fine clusters on the plane of their main directions."""
    shown = sorted(result.fine, key=lambda card: (-card.size, card.index))
    plane, share = principal_plane(result.clustering.fine_centers[[card.index for card in shown]])
    positions = fit_box(plane, MAP_SIZE, margin=34.0)
    largest = float(np.clip(340 / math.sqrt(len(shown)), 7, 26))
    biggest = max(shown[0].size, 1)
    dots = [
        {
            "index": card.index,
            "expert": card.expert,
            "size": card.size,
            "keywords": card.keywords,
            "nearest_captions": card.nearest_captions,
            "x": round(float(x), 1),
            "y": round(float(y), 1),
            "r": round(max(2.0, largest * math.sqrt(card.size / biggest)), 1),
            "tasks": [],
        }
        for card, (x, y) in zip(shown, positions, strict=True)
    ]
    return {
        "dots": dots,
        "labels": choose_labels(dots),
        "size": MAP_SIZE,
        "share": share,
        "experts": result.experts,
        "imbalance": result.imbalance,
        "objective": result.objective,
    }


def build_experts(result: ClusterResult, pictures: dict[tuple[str, int], list[Json]]) -> list[Json]:
    """Arrange each expert's card, its pictures and its own fine clusters, largest first."""
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
    """Read pictures of experts and fine clusters until the budget is spent.

    Returns:
        Pictures of ("expert", k) and ("fine", s), and why there are no more, if it is not the budget.
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
            source = encode_image(image)
            spent += len(source)
            if spent > most_bytes:
                return pictures, ""
            pictures.setdefault(owner, []).append({"source": source, "small": is_small(image), "caption": str(caption)})
    return pictures, ""


def _wanted(result: ClusterResult) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield whose picture is wanted and its row, the most wanted first."""
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
    """Return nearest and random rows of a card in turn, each once."""
    pairs = itertools.zip_longest(card.nearest_rows, card.random_rows)
    return list(dict.fromkeys(row for pair in pairs for row in pair if row is not None))


def _render(**parts: Any) -> str:
    """Fill the template with the parts of the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": format_count,
        "duration": format_duration,
        "label": label,
        "short": format_short,
        "effective": math.exp,
        "entropy_limit": lambda count: math.log(max(count, 1)),
    }
    script = environment.get_template("report.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("atlas.html").render(**parts, script=script, script_hash=digest)
