"""The atlas of a run: a place for every pair on one map, what its colours mean, and selections that become masks.

A fine cluster is a disc whose area is its number of pairs. Discs lie as the fine centres do on the map of the report
(t-SNE), moved apart until none covers another. A pair lies in its cluster's disc: the farther from the centre, the
nearer to the rim, and on the side of that neighbour which it leans to. The directions come from the neighbouring
centres alone: a rotation (Procrustes) that brings their directions in the space of vectors to those on the map. So no
projection is fitted to the pairs, and what is placed once stays where it is when a mask or a score is added.

A selection on the map, by lassos and by whole clusters, is saved as a column of booleans in the catalog, which every
stage takes as ``--mask``.

    RUN/atlas/places.safetensors    the places, kept until the clustering or the pairs change
    RUN/atlas/atlas.parquet         the same with captions and pictures, for other viewers

Rejected: UMAP or t-SNE of the pairs themselves, which cost far more and draw another picture for each seed.
Price: one pass over the embeddings, and the map of the centres (`neighbour_plane`), once.
"""

from __future__ import annotations

import hashlib
import io
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from modeclip.clustering.clusters import CLUSTERING_FILE
from modeclip.clustering.embedding import COLUMN, check_finite
from modeclip.clustering.fitting import CARDS_FILE, ClusterResult
from modeclip.data.catalog import PAIR_COLUMNS, Catalog
from modeclip.errors import DamagedError, ModeclipError, unknown
from modeclip.pages.charts import neighbour_plane
from modeclip.pages.html import is_small
from modeclip.system.files import replacing
from modeclip.system.paths import RunPaths

if TYPE_CHECKING:
    from PIL.Image import Image

Json = dict[str, Any]
Stamp = tuple[tuple[int, int, int], ...]

PLACES_FILE, TABLE_FILE = "places.safetensors", "atlas.parquet"
FORMAT, FORMAT_VERSION = "modeclip.places", "1"
NEIGHBOURS = 8
"""Neighbouring discs that the directions inside a disc come from."""
FILLED = 0.5
"""Share of the map that discs would fill if they lay evenly."""
GAP = 1.06
"""Least distance of two discs, as a multiple of the sum of their radii."""
MOST_SHOWN = 1_000_000
"""Points that a browser gets; of more pairs every n-th is shown, and a selection still takes all of them."""
MOST_VALUES = 11
"""Values of a column of texts that have a colour of their own."""
MISSING = 255
ROWS_AT_ONCE = 8192
MASK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
MADE_HERE = "atlas"
"""Entry in the facts of a column that a selection on the map made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where everything lies on the map, whose longer side reaches from -1 to 1."""

    discs: Float[np.ndarray, "M 3"]
    """Centre and radius of each fine cluster's disc, float32; radius 0 if it has no pairs."""
    pairs: Float[np.ndarray, "N 2"]
    """Place of each pair, float32."""
    novelty: Float[np.ndarray, " N"]
    """Share of the pairs of its cluster that lie nearer to the centre, float32."""


class Atlas:
    """The atlas of a run folder; threads may share it."""

    def __init__(self, run: Path) -> None:
        self.paths = RunPaths(folder=run)
        self._lock = threading.Lock()
        self._catalog: tuple[Stamp, Catalog] | None = None
        self._known: tuple[Stamp, str, ClusterResult, Places] | None = None

    @property
    def catalog(self) -> Catalog:
        """The run's catalog as it is now."""
        path = self.paths.catalog_path
        stamp = _stamp(path / "_versions")
        known = self._catalog
        if known is None or known[0] != stamp:
            known = self._catalog = stamp, Catalog.open(path, verify=False)
        return known[1]

    def _opened(self) -> tuple[Catalog, ClusterResult, Places]:
        """Return the catalog, its clusters and the places, which are computed if they are not known yet."""
        catalog, folder = self.catalog, self.paths.clusters
        if "fine_cluster" not in catalog.columns:
            raise ModeclipError(
                f"catalog {catalog.path!r} is not clustered, so there is no atlas: modeclip cluster {self.paths.folder}"
            )
        with self._lock:
            stamp = _stamp(folder / CLUSTERING_FILE, folder / CARDS_FILE)
            if self._known is None or self._known[0] != stamp or self._known[1] != catalog.fingerprint:
                result = ClusterResult.load(folder)
                state = f"{FORMAT_VERSION} {result.clustering.digest} {catalog.fingerprint} {len(catalog)}"
                places = self._read(state) or self._place(state, catalog, result)
                self._known = stamp, catalog.fingerprint, result, places
            return catalog, self._known[2], self._known[3]

    def _read(self, state: str) -> Places | None:
        from safetensors import SafetensorError, safe_open

        path = self.paths.atlas / PLACES_FILE
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get(FORMAT) != state:
                    return None
                return Places(**{name: file.get_tensor(name) for name in ("discs", "pairs", "novelty")})
        except (OSError, SafetensorError):  # not there, or cut short: it is made anew
            return None

    def _place(self, state: str, catalog: Catalog, result: ClusterResult) -> Places:
        from safetensors.numpy import save_file

        places = place(catalog, result)
        path = self.paths.atlas / PLACES_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                save_file(asdict(places), part, metadata={FORMAT: state})
        except OSError:  # a run that lies on a disk for reading only has an atlas too
            pass
        return places

    def summary(self) -> Json:
        """Return what the page must know before it draws: experts, clusters, colours, and how many pairs there are."""
        catalog, result, places = self._opened()
        return {
            "run": self.paths.folder.name,
            "num_pairs": len(catalog),
            "step": _step(len(catalog)),
            "experts": [
                {"index": card.index, "size": card.size, "num_fine": card.num_fine, "keywords": list(card.keywords)}
                for card in result.experts
            ],
            "clusters": [
                {
                    "index": card.index,
                    "expert": card.expert,
                    "size": card.size,
                    "keywords": list(card.keywords),
                    "caption": card.nearest_captions[0] if card.nearest_captions else "",
                    "disc": [round(float(number), 5) for number in places.discs[card.index]],
                }
                for card in result.fine
            ],
            "colours": _colours(catalog),
        }

    def points(self) -> bytes:
        """Return x and y of the pairs that are shown as little-endian float32."""
        catalog, _, places = self._opened()
        return places.pairs[:: _step(len(catalog))].astype("<f4").tobytes()

    def colour(self, name: str) -> tuple[Json, bytes]:
        """Return what the colours of a column mean, and a byte for each pair that is shown.

        A byte is the position of a category, or a share of the range in 254 parts; 255 stands for no value.

        Raises:
            ModeclipError: No such column has colours.
        """
        catalog, result, places = self._opened()
        known = {colour["name"]: colour["kind"] for colour in _colours(catalog)}
        if name not in known:
            raise unknown("colour of the atlas", name, list(known))
        step = _step(len(catalog))
        if name == "expert":
            experts = _first_experts(catalog.read(["expert"])["expert"])
            legend: Json = {"categories": [f"expert {card.index}" for card in result.experts]}
            return legend | {"kind": "expert"}, experts[::step].astype(np.uint8).tobytes()
        values = places.novelty if name == "novelty" else catalog.read([name])[name]
        legend, codes = _encode(known[name], values)
        return legend | {"kind": known[name]}, codes[::step].tobytes()

    def cluster(self, index: int) -> Json:
        """Return the card of a fine cluster, its disc, and the share of it that each mask has.

        Raises:
            ModeclipError: There is no such cluster.
        """
        catalog, result, places = self._opened()
        if not 0 <= index < len(result.fine):
            raise ModeclipError(f"cluster {index}: expected 0 to {len(result.fine) - 1}")
        card, own = result.fine[index], catalog.select(fine_cluster=index)
        masks = [colour["name"] for colour in _colours(catalog) if colour["kind"] == "mask"]
        read = catalog.read(masks, own) if masks and len(own) else {}
        return {
            **asdict(card),
            "disc": places.discs[index].tolist(),
            "masks": {
                name: float(np.mean([value is True for value in values.tolist()])) for name, values in read.items()
            },
        }

    def members(self, index: int, count: int) -> list[int]:
        """Return rows of a fine cluster spread from its centre to its rim, the nearest first."""
        catalog, _, places = self._opened()
        own = catalog.select(fine_cluster=index)
        own = own[np.argsort(places.novelty[own], kind="stable")]
        return [int(row) for row in own[np.unique(np.linspace(0, len(own) - 1, min(count, len(own))).astype(int))]]

    def pairs(self, rows: Sequence[int]) -> list[Json]:
        """Return what is known of some pairs.

        Raises:
            ModeclipError: There is no such row.
        """
        catalog, _, places = self._opened()
        if bad := next((row for row in rows if not 0 <= row < len(catalog)), None):
            raise ModeclipError(f"row {bad}: expected 0 to {len(catalog) - 1}")
        if not rows:
            return []
        read = catalog.read(["key", "caption", "expert", "fine_cluster"], np.array(rows))
        experts = _first_experts(read["expert"])
        return [
            {
                "row": row,
                "key": read["key"][place],
                "caption": read["caption"][place] or "",
                "expert": int(experts[place]),
                "cluster": int(read["fine_cluster"][place]),
                "novelty": float(places.novelty[row]),
                "place": places.pairs[row].tolist(),
            }
            for place, row in enumerate(rows)
        ]

    def rows_of_keys(self, keys: Sequence[str]) -> list[int]:
        """Return the first row of each key that the catalog has."""
        catalog = self.catalog
        found = [catalog.select(key=key) for key in keys]
        return [int(rows[0]) for rows in found if len(rows)]

    def picture(self, row: int, size: int) -> bytes:
        """Return the picture of a pair as a file: exactly if it is an icon, else as a thumbnail of at most ``size``."""
        catalog = self.catalog
        if not 0 <= row < len(catalog):
            raise ModeclipError(f"row {row}: expected 0 to {len(catalog) - 1}")
        return thumbnail(catalog.images(np.array([row]))[0], size)

    def selected(
        self, polygons: Sequence[Sequence[tuple[float, float]]], clusters: Sequence[int], rows: Sequence[int] = ()
    ) -> Bool[np.ndarray, " N"]:
        """Return for each pair whether it lies in one of the lassos or clusters, or is one of the rows."""
        catalog, result, places = self._opened()
        chosen = np.zeros(len(catalog), bool)
        for polygon in polygons:
            chosen |= inside(places.pairs, np.array(polygon, np.float64))
        if clusters:
            if bad := next((index for index in clusters if not 0 <= index < len(result.fine)), None):
                raise ModeclipError(f"cluster {bad}: expected 0 to {len(result.fine) - 1}")
            chosen |= np.isin(catalog.read(["fine_cluster"])["fine_cluster"], clusters)
        if len(rows):
            numbers = np.array(rows, np.int64)
            if numbers.min() < 0 or numbers.max() >= len(catalog):
                raise ModeclipError(f"rows: expected 0 to {len(catalog) - 1}")
            chosen[numbers] = True
        return chosen

    def save_mask(self, name: str, chosen: Bool[np.ndarray, " N"], *, replace: bool = False) -> Json:
        """Save a selection as a column of booleans and return how stages take it.

        Args:
            name: Name of the column.
            chosen: A boolean for each pair.
            replace: Replace a selection of this name.

        Raises:
            ModeclipError: The name is none, belongs to another column, nothing is selected, or another process writes.
        """
        catalog = self.catalog
        if not MASK_NAME.fullmatch(name):
            raise ModeclipError(
                f"name {name!r}: expected a letter and then at most 62 letters, digits or _, such as weather_icons"
            )
        if name in catalog.columns:
            if MADE_HERE not in (catalog.facts(name) or {}):
                raise ModeclipError(f"name {name!r}: the catalog has a column of this name; choose another")
            if not replace:
                raise TakenError(f"name {name!r}: there is a selection of this name; choose another, or replace it")
        if not chosen.any():
            raise ModeclipError("nothing is selected: draw around some points, or add a cluster")
        rows = hashlib.blake2b(np.packbits(chosen).tobytes(), digest_size=16).hexdigest()
        catalog.add_columns({name: chosen}, {MADE_HERE: {"pairs": int(chosen.sum()), "rows": rows}})
        folder, out = (shlex.quote(str(path)) for path in (self.paths.folder, f"{self.paths.folder}-{name}"))
        return {
            "name": name,
            "num_selected": int(chosen.sum()),
            "num_pairs": len(catalog),
            "commands": [
                f"modeclip train {folder} --mask {name} --out {out}",
                f"modeclip check {folder} --mask {name}",
            ],
        }

    def remove_mask(self, name: str) -> None:
        """Remove a selection that was saved here.

        Raises:
            ModeclipError: There is none of this name.
        """
        catalog = self.catalog
        own = [column for column in catalog.columns if MADE_HERE in (catalog.facts(column) or {})]
        if name not in own:
            raise unknown("selection", name, own)
        catalog.remove_columns([name])

    def write_table(self, path: Path | None = None) -> Path:
        """Write places, captions, clusters and pictures as a Parquet file, which other viewers of maps open.

        The columns are x, y, text, expert, cluster, novelty, key and image ({bytes, path}, as Hugging Face has it).
        """
        import pyarrow.parquet as pq

        path = path or self.paths.atlas / TABLE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, pq.ParquetWriter(part, TABLE_SCHEMA, compression="zstd") as writer:
            for batch in self._table_batches():
                writer.write_batch(batch)
        return path

    def _table_batches(self) -> Iterator[pa.RecordBatch]:
        catalog, result, places = self._opened()
        words = [", ".join(card.keywords) for card in result.fine]
        for start in range(0, len(catalog), 1024):
            rows = np.arange(start, min(start + 1024, len(catalog)))
            read = catalog.read(["key", "caption", "expert", "fine_cluster"], rows)
            images = [{"bytes": data, "path": None} for data in catalog.encoded_images(rows)]
            columns = [
                places.pairs[rows, 0],
                places.pairs[rows, 1],
                read["caption"],
                [f"expert {number}" for number in _first_experts(read["expert"]).tolist()],
                [words[number] for number in read["fine_cluster"].tolist()],
                places.novelty[rows],
                read["key"],
                images,
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, TABLE_SCHEMA, strict=True)]
            yield pa.record_batch(arrays, schema=TABLE_SCHEMA)


TABLE_SCHEMA = pa.schema(
    {
        "x": pa.float32(),
        "y": pa.float32(),
        "text": pa.string(),
        "expert": pa.string(),
        "cluster": pa.string(),
        "novelty": pa.float32(),
        "key": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
)


class TakenError(ModeclipError):
    """A selection of this name exists."""


def _first_experts(values: Int[np.ndarray, "n *K"]) -> Int[np.ndarray, " n"]:
    """Return the expert of each pair, the first one where the clustering gave it several."""
    return values if values.ndim == 1 else values[:, 0]


def _stamp(*paths: Path) -> Stamp:
    """Return what tells whether files or folders have changed."""
    about = [path.stat() for path in paths if path.exists()]
    return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in about)


# ---------------------------------------------------------------- places


def place(catalog: Catalog, result: ClusterResult) -> Places:
    """Give every fine cluster its disc and every pair its place."""
    clustering = result.clustering
    fine = catalog.read(["fine_cluster"])["fine_cluster"].astype(np.int64)
    if len(fine) and int(fine.max()) >= clustering.num_fine:
        raise DamagedError(
            f"catalog {catalog.path!r} has a fine cluster {int(fine.max())}, the clustering {clustering.num_fine} of"
            " them: cluster again (modeclip cluster)"
        )
    sizes = np.bincount(fine, minlength=clustering.num_fine)
    discs = place_discs(neighbour_plane(clustering.fine_centers), sizes)
    turns = directions(clustering.fine_centers, discs[:, :2])
    novelty = _ranks(fine, catalog.read(["fine_distance"])["fine_distance"], clustering.num_fine)
    pairs, start = np.empty((len(fine), 2), np.float32), 0
    for block in catalog.batches([COLUMN], ROWS_AT_ONCE):
        own = fine[start : start + len(block[COLUMN])]
        offsets = check_finite(block[COLUMN]) - clustering.fine_centers[own]
        pairs[start : start + len(own)] = np.einsum("nd,ndk->nk", offsets, turns[own])
        start += len(own)
    return Places(discs=discs, pairs=_spread(pairs, fine, discs, novelty), novelty=novelty)


def place_discs(plane: Float[np.ndarray, "M 2"], sizes: Int[np.ndarray, " M"]) -> Float[np.ndarray, "M 3"]:
    """Make a disc of each cluster, with its size as area, and move discs apart until none covers another."""
    from scipy.spatial import cKDTree

    centres = plane.astype(np.float64) - plane.mean(axis=0)
    centres /= max(float(np.abs(centres).max()), 1e-9)
    radii = np.sqrt(sizes / max(int(sizes.sum()), 1) * 4 * FILLED / np.pi)
    shown = np.flatnonzero(sizes)
    for _ in range(400):
        close = cKDTree(centres[shown]).query_pairs(2 * GAP * float(radii.max()), output_type="ndarray")
        one, other = shown[close[:, 0]], shown[close[:, 1]]
        between = centres[other] - centres[one]
        distance = np.linalg.norm(between, axis=1)
        lack = GAP * (radii[one] + radii[other]) - distance
        if not (lack > 1e-4).any():
            break
        one, other, between, distance, lack = (part[lack > 0] for part in (one, other, between, distance, lack))
        same = distance < 1e-9  # two at one place part along a direction of their own
        angle = 2.4 * (one + other)
        between[same] = np.stack([np.cos(angle), np.sin(angle)], axis=1)[same]
        push = between / np.where(same, 1, distance)[:, None] * (0.5 * lack)[:, None]
        np.add.at(centres, one, -push)
        np.add.at(centres, other, push)
    low, high = (centres - radii[:, None]).min(axis=0), (centres + radii[:, None]).max(axis=0)
    scale = 2 / max(float((high - low).max()), 1e-9)
    return np.column_stack([(centres - (low + high) / 2) * scale, radii * scale]).astype(np.float32)


def directions(centers: Float[np.ndarray, "M D"], plane: Float[np.ndarray, "M 2"]) -> Float[np.ndarray, "M D 2"]:
    """Return for each cluster two orthonormal directions that show on the map where its neighbours lie.

    They are the orthogonal Procrustes solution of the differences to the neighbouring centres, each of length 1, in
    the space of vectors and on the map.
    """
    from scipy.spatial import cKDTree

    num_fine, dimension = centers.shape
    turns = np.zeros((num_fine, dimension, 2), np.float32)
    if num_fine < 3 or dimension < 2:
        turns[:, : min(2, dimension), : min(2, dimension)] = np.eye(min(2, dimension))
        return turns
    near = cKDTree(plane).query(plane, min(NEIGHBOURS + 1, num_fine))[1][:, 1:]
    for index, neighbours in enumerate(near):
        apart = _unit(centers[neighbours].astype(np.float64) - centers[index])
        shown = _unit(plane[neighbours].astype(np.float64) - plane[index])
        left, _, right = np.linalg.svd(apart.T @ shown, full_matrices=False)
        turns[index] = left @ right
    return turns


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def _ranks(fine: Int[np.ndarray, " N"], values: Float[np.ndarray, " N"], num_fine: int) -> Float[np.ndarray, " N"]:
    """Return which share of its cluster has a lower value than each pair, in (0, 1)."""
    order, sizes = np.lexsort((values, fine)), np.bincount(fine, minlength=num_fine)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(fine), np.int64)
    rank[order] = np.arange(len(fine)) - starts[fine[order]]
    return np.asarray((rank + 0.5) / sizes[fine], np.float32)


def _spread(
    offsets: Float[np.ndarray, "N 2"],
    fine: Int[np.ndarray, " N"],
    discs: Float[np.ndarray, "M 3"],
    novelty: Float[np.ndarray, " N"],
) -> Float[np.ndarray, "N 2"]:
    """Turn offsets to places: the angle is the offset's, the radius grows with the novelty so that a disc is filled."""
    angle = np.arctan2(offsets[:, 1], offsets[:, 0])
    idle = np.abs(offsets).max(axis=1, initial=0) < 1e-6  # a caption at the centre leans to no side
    angle[idle] = np.flatnonzero(idle) * 2.399963 % (2 * np.pi) - np.pi
    angle = (angle + np.pi * (2 * _ranks(fine, angle, len(discs)) - 1)) / 2  # half of it even, so that discs fill
    radius = 0.96 * np.sqrt(novelty) * discs[fine, 2]
    return np.asarray(discs[fine, :2] + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), np.float32)


def inside(points: Float[np.ndarray, "N 2"], polygon: Float[np.ndarray, "V 2"]) -> Bool[np.ndarray, " N"]:
    """Tell which points lie inside a polygon, by the number of its edges to their right.

    Examples:
        >>> square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
        >>> inside(np.array([[0.5, 0.5], [1.5, 0.5]], np.float32), square).tolist()
        [True, False]
    """
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    near = np.flatnonzero(((points >= low) & (points <= high)).all(axis=1))
    x, y = points[near].astype(np.float64).T
    found = np.zeros(len(near), bool)
    for (x1, y1), (x2, y2) in zip(polygon.tolist(), np.roll(polygon, -1, axis=0).tolist(), strict=True):
        if y1 != y2:
            found ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    chosen = np.zeros(len(points), bool)
    chosen[near[found]] = True
    return chosen


# ---------------------------------------------------------------- colours


def _step(num_pairs: int) -> int:
    return max(1, -(-num_pairs // MOST_SHOWN))


def _colours(catalog: Catalog) -> list[Json]:
    """Return the columns that points can be coloured by: experts, novelty, then masks, numbers and texts."""
    found: list[Json] = [{"name": "expert", "kind": "expert"}, {"name": "novelty", "kind": "number"}]
    for name in catalog.columns:
        kind = catalog.type_of(name)
        if name in {"expert", "novelty", "fine_cluster", "key", "caption", "path", "offset", "size", "task"}:
            continue
        if kind == "bool":
            found.append({"name": name, "kind": "mask", "own": MADE_HERE in (catalog.facts(name) or {})})
        elif kind in {"float", "double", "halffloat"} or (kind.startswith(("int", "uint")) and name not in {"offset"}):
            found.append({"name": name, "kind": "number"})
        elif kind in {"string", "large_string"} and (name not in PAIR_COLUMNS or name == "group"):
            found.append({"name": name, "kind": "text"})
    return found


def _encode(kind: str, values: Shaped[np.ndarray, " N"]) -> tuple[Json, UInt8[np.ndarray, " N"]]:
    """Return what the colours of a column mean, and a byte for each of its values."""
    if kind == "mask":
        known = values if values.dtype == bool else np.array([value is True for value in values])
        return {"categories": ["not selected", "selected"]}, known.astype(np.uint8)
    if kind == "text":
        texts = np.array(["" if value is None else str(value) for value in values])
        names, codes, counts = np.unique(texts, return_inverse=True, return_counts=True)
        kept = np.argsort(-counts, kind="stable")[:MOST_VALUES]
        place_of = np.full(len(names), len(kept))
        place_of[kept] = np.arange(len(kept))
        shown = [names[index][:40] or "none" for index in kept] + (["other"] if len(names) > len(kept) else [])
        return {"categories": shown}, place_of[codes].astype(np.uint8)
    numbers = np.array([np.nan if value is None else value for value in values], np.float64)
    good = np.isfinite(numbers)
    low, high = np.quantile(numbers[good], [0.01, 0.99]) if good.any() else (0.0, 1.0)
    shares = (numbers - low) / (high - low if high > low else 1.0)
    codes = np.where(good, np.clip(np.nan_to_num(shares), 0, 1) * 254, MISSING).astype(np.uint8)
    return {"range": [float(low), float(high)]}, codes


def thumbnail(image: Image, size: int) -> bytes:
    """Return a picture as a file: an icon exactly, as PNG; others as WebP of at most this many pixels a side."""
    buffer = io.BytesIO()
    if is_small(image):
        image.save(buffer, "PNG")
    else:
        image.thumbnail((size, size))
        image.save(buffer, "WEBP", quality=82)
    return buffer.getvalue()
