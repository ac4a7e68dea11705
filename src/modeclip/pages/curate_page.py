"""The pages of a curation: what it kept and why not, and how two selections differ.

Both show the sides of a pool (`modeclip.curation.surveying`): before and after, or all pairs and two selections. Words
and order lie in the templates; here charts are placed and pictures are read, until their budget of bytes is spent.

Price: a second, for the pictures. The page weighs as much as its pictures and 0.3 KB for each cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.curation.comparing import Comparison
from modeclip.curation.explaining import Explanation
from modeclip.curation.method import Curve, Histogram
from modeclip.curation.surveying import Group, Pair, Survey, Texts
from modeclip.data.catalog import Catalog
from modeclip.pages.charts import draw_histogram, draw_lines, draw_sides
from modeclip.pages.check_page import Tile, read_tiles
from modeclip.pages.html import embed_picture, write_page

Json = dict[str, Any]

PAGE_FILE, COMPARE_FILE = "curate.html", "compare.html"
PICTURE_BYTES = 4_000_000
"""Most bytes that all pictures together take in a page."""
MAX_CLUSTERS = 1000
"""Clusters that a page shows, those that changed most; the explanation has all."""
OPEN_CLUSTERS = 24
"""Clusters that are shown without a click."""
CHART = (380.0, 220.0)
"""Size of a chart in its own units."""
SAME_SCALE = 20.0
"""Lines whose largest values differ by more than this factor are drawn on charts of their own."""


def write_curation(
    catalog: Catalog, explanation: Explanation, folder: Path | str, *, picture_bytes: int = PICTURE_BYTES
) -> Path:
    """Write ``curate.html`` to a folder and return its path; an existing page is replaced as a whole.

    Args:
        catalog: The catalog that was curated. A picture that cannot be read is crossed out, with the reason.
        explanation: What `modeclip.curation.explaining.explain` returned.
        folder: The folder; it is made if it is missing.
        picture_bytes: Most bytes of all pictures together; 0 shows none.
    """
    groups = (explanation.kept, *explanation.causes)
    tones = ["kept", *(f"e{place}" for place in range(len(explanation.causes)))]
    return write_page(
        Path(folder) / PAGE_FILE,
        "curate.html",
        name=catalog.name,
        explanation=explanation,
        num_experts=max(4, len(explanation.causes)),
        groups=_with_pictures(catalog, groups, tones, picture_bytes),
        charts=[chart for given in explanation.charts for chart in place_chart(given)],
        **place_survey(explanation.survey),
    )


def write_comparison(
    catalog: Catalog, comparison: Comparison, folder: Path | str, *, picture_bytes: int = PICTURE_BYTES
) -> Path:
    """Write ``compare.html`` to a folder and return its path; the arguments are as for `write_curation`."""
    return write_page(
        Path(folder) / COMPARE_FILE,
        "curate_compare.html",
        name=catalog.name,
        comparison=comparison,
        groups=_with_pictures(catalog, comparison.groups, ["kept", "e0", "e1", "rest"], picture_bytes),
        **place_survey(comparison.survey),
    )


def place_survey(survey: Survey) -> Json:
    """Return what the templates show of a survey."""
    found = survey.clusters
    clusters = [] if found is None else found.clusters[:MAX_CLUSTERS]
    totals = np.array([cluster.counts for cluster in found.clusters]).sum(0).tolist() if found else []
    shares = [_share(cluster.counts[-1], cluster.counts[0]) for cluster in found.clusters] if found else []
    return {
        "survey": survey,
        "captions": _with_bars(survey.captions),
        "words": _with_bars(survey.words),
        "bins": [(bins, draw_sides(bins.edges, bins.counts, size=CHART, log=bins.is_log)) for bins in survey.bins],
        "clusters": [
            {"cluster": cluster, "shares": [_share(count, cluster.counts[0]) for count in cluster.counts[1:]]}
            for cluster in clusters
        ],
        "mean_shares": [_share(total, totals[0]) for total in totals[1:]],
        "num_clusters": len(found.clusters) if found else 0,
        "open_clusters": OPEN_CLUSTERS,
        "cluster_shares": draw_histogram(100 * np.array(shares), size=(1080.0, 200.0))
        if len(shares) > OPEN_CLUSTERS
        else None,
    }


def place_chart(given: Histogram | Curve) -> Iterator[Json]:
    """Yield the charts of a histogram, or of the lines of a curve: those of very different scales apart."""
    if isinstance(given, Histogram):
        sides = [list(map(float, given.counts)), *([list(given.kept)] if given.kept is not None else [])]
        drawn = draw_sides(given.edges, sides, size=CHART, log=given.is_log, threshold=given.threshold)
        yield {"kind": "histogram", "given": given, "drawn": drawn}
        return
    for lines in _by_scale(given.lines):
        drawn = draw_lines(given.x, lines, size=CHART, log=given.is_log, chosen=given.chosen)
        yield {"kind": "curve", "given": given, "drawn": drawn}


def _by_scale(lines: Mapping[str, Sequence[float]]) -> list[dict[str, Sequence[float]]]:
    """Divide lines into those that one axis can show."""
    found: list[tuple[float, dict[str, Sequence[float]]]] = []
    for name, line in lines.items():
        most = max(map(abs, line), default=0.0) or 1.0
        for scale, others in found:
            if scale / SAME_SCALE <= most <= scale * SAME_SCALE:
                others[name] = line
                break
        else:
            found.append((most, {name: line}))
    return [group for _, group in found]


def _share(count: float, total: float) -> float:
    return count / total if total else 0.0


def _with_bars(texts: Texts) -> list[Json]:
    """Return the frequent texts with the length of a bar for each side, in [0, 1]."""
    most = max([1.0, *(count for frequent in texts.frequent for count in frequent.counts)])
    return [
        {"text": frequent.text, "sides": [(count, count / most) for count in frequent.counts]}
        for frequent in texts.frequent
    ]


def _with_pictures(catalog: Catalog, groups: Sequence[Group], tones: Sequence[str], most_bytes: int) -> list[Json]:
    """Return groups with the pictures of their examples; the first ones of all groups come before the second ones."""
    shown: list[list[Json]] = [[] for _ in groups]
    left = most_bytes
    for place in range(max((len(group.pairs) for group in groups), default=0)):
        some = [(number, group.pairs[place]) for number, group in enumerate(groups) if place < len(group.pairs)]
        rows = [row for _, pair in some for row in (pair.row, pair.copy_of) if row is not None]
        tiles = {tile.row: tile for tile in read_tiles(catalog, np.array(rows, np.int64))} if left > 0 else {}
        for number, pair in some:
            picture, left = _take(tiles.get(pair.row), pair, left)
            other = None
            if pair.copy_of in tiles:
                twin = tiles[pair.copy_of]
                other, left = _take(twin, Pair(row=twin.row, key=twin.key, caption=twin.caption), left)
            new = pair.new_caption or pair.caption
            added = new.removeprefix(pair.caption) if new.startswith(pair.caption) else f" → {new}"
            shown[number].append(picture | {"detail": _detail(pair), "added": added, "copy_of": other})
    most = max([group.count for group in groups], default=0) or 1
    return [
        {"group": group, "tone": tone, "pictures": pictures, "part": group.count / most}
        for group, tone, pictures in zip(groups, tones, shown, strict=True)
    ]


def _take(tile: Tile | None, pair: Pair, left: int) -> tuple[Json, int]:
    """Return what the template shows of a pair, and how many bytes are left for further pictures."""
    left_out = "left out: the page has as many pictures as it may"
    image, cause = (None, left_out) if tile is None else (tile.image, tile.cause)
    picture = embed_picture(image, pair.caption, place=f"row {pair.row:,}, key {pair.key}", cause=cause)
    if len(picture["source"]) > left:
        return picture | {"source": "", "cause": left_out}, 0
    return picture, left - len(picture["source"])


def _detail(pair: Pair) -> str:
    """Return the figures of an example in words."""
    parts = [f"score {pair.score:.3f}"] if pair.score is not None else []
    if pair.probability:
        parts.append(f"drawn {100 * pair.probability:.3g} %")
    return ", ".join(parts)
