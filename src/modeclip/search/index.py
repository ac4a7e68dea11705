"""The index: a Lance dataset with a row per image, its vector in float16, and the columns that searches filter by.

    INDEX/
      index.json       format, model and its digests, catalogs, how strong known pairs are, the version of the dataset;
                       where model and catalogs lie, from here and as a whole path
      candidates-V.faiss    of a large index: faiss's, of the dataset's version V
      images.lance     key, caption, path, digest, numbers and texts of the catalog, vector (D float16)

Images are encoded once, with all experts of a mixture. A query is encoded, weighed by the router on the text side, and
compared with all rows exactly (`modeclip.search.exact`); above ``exact_up_to`` rows faiss names candidates, if it finds
enough: its recall is measured on captions when the index is built (`modeclip.search.approximate`).

``index.json`` is written last and names the version of the dataset, so whoever opens the index sees what was finished,
while images are added or after a process was killed. Encoding goes fragment by fragment over the catalog and continues
where it was stopped; what it has computed lies beside the catalog until the rows are in the index.

Scores. A hit's score is the mixture's, sum_c p_c <u_c, v_c>. What score is high differs from query to query. So each
hit has its height too: by how many standard deviations its score lies above the mean of the query's scores over the
index. And it has a strength: the share of known pairs, captions with their own images, whose height is lower. A hit of
strength 0.03 is weaker than 97 of 100 captions are with the image that they describe.

Several parts of one query (a text, a picture, texts that are not wanted) are divided by the spread of their scores
before they are weighed, since cosines between pictures are several times as large as those with texts.

Source: MoDE (arXiv 2404.16030) Sec. 3.4 for the score; reciprocal rank fusion: Cormack et al. (SIGIR 2009), k = 60.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Shaped

from modeclip.data.catalog import Catalog
from modeclip.data.images import decode_image
from modeclip.data.mapping import IMAGE, POSITION, Statistic, concatenate, map_fragments
from modeclip.data.selection import ALL, Selection
from modeclip.data.storage import KEEP_VERSIONS, exists
from modeclip.errors import DamagedError, ModeclipError, unknown
from modeclip.mixture.manifest import split_expert
from modeclip.search.approximate import Approximate, Candidates, build_approximate, faiss_is_there
from modeclip.search.asking import SearchModel, encode_query
from modeclip.search.exact import Rows
from modeclip.search.query import Added, Asked, Found, Hit, Query, SearchConfig
from modeclip.system.console import log
from modeclip.system.files import LOCK_FILE, only_process, parse_json, read_json, to_json, write_atomically, writing
from modeclip.system.paths import filesystem, home_path, is_url, join, list_folder, reaching, read_bytes, state

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
INDEX_FILE, ROWS_FOLDER, CANDIDATES_PREFIX = "index.json", "images.lance", "candidates-"
CONTENT = ("model", "config", "catalogs", "version", "heights")
"""What ``index.json`` must hold besides its format."""
VECTOR = "vector"
FIXED = {
    "key": pa.string(),
    "caption": pa.string(),
    "path": pa.string(),
    "digest": pa.binary(16),
    "catalog": pa.int16(),
    "row": pa.int64(),
}
"""Columns that every index has besides the vector; ``catalog`` and ``row`` say where the picture is."""
LEFT_OUT = {"image", "offset", "size", VECTOR, *FIXED}
SAMPLE = 4096
"""Rows that the spread of a query's scores is measured on."""
LEAST_SPREAD = 1e-4
"""Spread of the scores of a query of norm 1 that float16 alone makes of equal images, somewhat rounded up."""
KNOWN_PAIRS = 512
"""Captions that the strength of hits is measured by."""
LEVELS = 101
FUSED, FUSED_FROM = 60, 100
"""Reciprocal rank fusion: the constant k, and how many hits of each ranking it looks at."""
ROWS_AT_ONCE = 8192
_AGAIN = "give the same modeclip search build command again"


class OtherModelError(ModeclipError):
    """An index was built with another model, or with what its model was before."""


@dataclass(kw_only=True)
class EncodeImages(Statistic):
    """Encodes the images of a block; every process opens the model itself."""

    spec: str
    facts: dict[str, Any]
    exif: Any
    encoder: str | None
    trusted: bool
    inputs: tuple[str, ...] = (IMAGE, POSITION)
    unit: str = "images"
    _model: SearchModel | None = field(default=None, repr=False)

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Return vectors and positions of the images of a block."""
        if self._model is None:
            self._model = SearchModel.open(self.spec, encoder=self.encoder, trust_encoder=self.trusted)
        rows = block[POSITION]
        if not len(rows):
            return {"rows": rows, VECTOR: np.empty((0, sum(self._model.sizes)), np.float16)}
        pictures = [decode_image(data, self.exif) for data in block[IMAGE]]
        return {"rows": rows, VECTOR: self._model.encode_images(pictures).astype(np.float16)}

    def merge(self, parts: Sequence[dict[str, Shaped[np.ndarray, "..."]]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Put blocks behind each other."""
        return concatenate(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model here: a worker opens its own."""
        return self.__dict__ | {"_model": None}


class Index:
    """An opened index. Threads may search it together; what is added later is seen by whoever opens it anew."""

    def __init__(self, folder: str, content: Mapping[str, Any], model: SearchModel) -> None:
        import lance

        self.folder, self.model = folder, model
        self._content = dict(content)
        self._opened: dict[str, Catalog] = {}
        self._dataset: Any = lance.dataset(join(folder, ROWS_FOLDER), version=content["version"])

    @classmethod
    def build(
        cls,
        catalog: Catalog,
        model: str | Path | SearchModel,
        folder: Path | str,
        config: SearchConfig | None = None,
        *,
        selection: Selection = ALL,
        ray: bool = False,
    ) -> Index:
        """Make an index of a catalog's images, or finish or bring up to date one that is there.

        Args:
            catalog: Whose images.
            model: What encodes them: a specification as for `SearchModel.open`.
            folder: Where the index goes, on this machine or in an object store (``s3://...``).
            config: How it answers.
            selection: Which pairs.
            ray: Encode on a Ray cluster, as for `map_fragments`.

        Raises:
            ModeclipError: The folder holds something else, or the index of another model; an image cannot be read.
        """
        folder, config = _place(folder), config or SearchConfig()
        model = model if isinstance(model, SearchModel) else SearchModel.open(model)
        if not state(join(folder, INDEX_FILE)) and _holds_more(folder):
            raise ModeclipError(
                f"--out {folder}: expected an index or an empty folder, found other files; choose another"
            )
        if not is_url(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        _add(folder, model, catalog, config, selection, ray)
        return cls.open(folder, model)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        model: SearchModel | None = None,
        *,
        encoder: str | None = None,
        trust_encoder: bool = False,
        device: str = "auto",
    ) -> Index:
        """Open an index and its model.

        Args:
            folder: Of the index.
            model: The opened model, where somebody has it; None: the one that the index names.
            encoder: As for `SearchModel.open`.
            trust_encoder: As for `SearchModel.open`.
            device: As for `SearchModel.open`.

        Raises:
            OtherModelError: It was built with another model, or the model has changed since.
            ModeclipError: There is no index, it is half built, or its model is gone.
        """
        folder = _place(folder)
        if not state(join(folder, INDEX_FILE)):
            half = (
                exists(join(folder, ROWS_FOLDER))
                if is_url(folder)
                else any(Path(folder, name).exists() for name in (ROWS_FOLDER, LOCK_FILE))
            )
            raise ModeclipError(
                f"index {folder}: it is half built; {_AGAIN}"
                if half
                else f"no index at {folder!r}: make one with modeclip search build, or correct the path"
            )
        content = _read_note(folder)
        if content.get("format") != FORMAT:
            raise ModeclipError(f"index {folder} has format {content.get('format')}, expected {FORMAT}; build it again")
        _check_note(folder, content)
        try:
            named = _found_model(folder, content["model"])
            digests, names = content["model"]["digests"], content["model"]["names"]
            model = model or SearchModel.open(named, device=device, encoder=encoder, trust_encoder=trust_encoder)
        except (KeyError, TypeError) as error:
            raise DamagedError(f"index {folder}: {INDEX_FILE} has no {error}; {_AGAIN}") from error
        if differing := [
            f"{name} has the hash {new[:12] or 'none'}, expected {old[:12]}"
            for name, old, new in zip(names, digests, [*model.digests, *[""] * len(digests)], strict=False)
            if old != new
        ]:
            raise OtherModelError(
                f"index {folder}: was built with another model than {model.spec} is ({'; '.join(differing)}); "
                "build the index again in another folder, or give the model that it was built with"
            )
        own = {name: value for name, value in model.facts().items() if name != "digests"}
        if "rule" in content["model"] and own != {name: content["model"].get(name) for name in own}:
            raise OtherModelError(
                f"index {folder}: its images were weighed by {content['model']['rule']} at temperature"
                f" {content['model'].get('temperature')}, but {model.spec} weighs by {own.get('rule')} at"
                f" {own.get('temperature')} now; build the index again in another folder"
            )
        with _reading_rows(folder):
            index = cls(folder, content, model)
            numbers = index._dataset.to_table(columns=["catalog"])["catalog"].unique().to_pylist()
        if not set(numbers) <= set(range(len(content["catalogs"]))):
            raise DamagedError(
                f"index {folder}: {INDEX_FILE} names {len(content['catalogs'])} catalogs, but its rows are of more; "
                f"delete the folder and {_AGAIN}"
            )
        return index

    def __len__(self) -> int:
        return int(self._dataset.count_rows())

    @property
    def columns(self) -> list[str]:
        """Columns that a condition may name."""
        return [name for name in self._dataset.schema.names if name != VECTOR]

    @property
    def catalogs(self) -> list[str]:
        """Paths of the catalogs that images came from."""
        return list(self._content["catalogs"])

    @property
    def config(self) -> SearchConfig:
        """How it answers."""
        return SearchConfig(**self._content["config"])

    @property
    def approximate(self) -> Approximate | None:
        """What the approximate index finds; None where searches are exact: there is none, or no faiss to read it."""
        content = self._content.get("approximate")
        return Approximate(**content) if content and content.get("file") and faiss_is_there() else None

    @cached_property
    def rows(self) -> Rows:
        """All vectors, in memory."""
        with self._reading():
            column = self._dataset.to_table(columns=[VECTOR])[VECTOR].combine_chunks()
        return Rows(np.asarray(column.flatten()).reshape(len(column), -1))

    @cached_property
    def _candidates(self) -> Candidates:
        """The approximate index, in memory."""
        assert self.approximate is not None
        path = join(self.folder, self.approximate.file)
        try:
            return Candidates.of_bytes(read_bytes(path) if is_url(path) else Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            self._check_unchanged()
            reason = " ".join(str(error).split())[:200]
            raise DamagedError(f"{path}: it cannot be read ({reason}); delete {self.folder} and {_AGAIN}") from error

    def add(self, catalog: Catalog, *, selection: Selection = ALL, ray: bool = False) -> Added:
        """Add the images of a catalog, and encode those anew that have changed; arguments and errors as for `build`.

        The opened index goes on as it was: open it again to see what was added.
        """
        return _add(self.folder, self.model, catalog, None, selection, ray)

    def remove(self, where: Sequence[str]) -> int:
        """Remove the images for which all conditions hold, and return how many; open the index again to see it.

        Raises:
            ModeclipError: No condition is given, one names no column, or all images would be removed.
        """
        if not where:
            raise ModeclipError("search remove: no --where condition given; expected at least one")
        with _alone(self.folder):
            now = Index.open(self.folder, self.model)  # it may have changed since this one was opened
            chosen = now._chosen(where)
            assert chosen is not None
            count = int(chosen.sum())
            if count == len(now):
                raise ModeclipError(
                    f"index {self.folder}: that would remove all {count:,} images; delete the folder instead"
                )
            dataset = _latest(self.folder, now._content["version"])
            pairs = now._take(["key", "catalog"], np.flatnonzero(chosen)).to_pylist()
            for number in range(len(now.catalogs)):
                keys = [pair["key"] for pair in pairs if pair["catalog"] == number]
                for start in range(0, len(keys), ROWS_AT_ONCE):
                    words = ", ".join("'" + key.replace("'", "''") + "'" for key in keys[start : start + ROWS_AT_ONCE])
                    dataset.delete(f"catalog = {number} AND key IN ({words})")
            _finish(self.folder, dataset, self.model, now._content)
        return count

    def search(
        self,
        query: Query | Asked | str,
        *,
        count: int = 10,
        where: Sequence[str] = (),
        least_strength: float = 0.0,
        hybrid: bool = False,
    ) -> Found:
        """Find the images that fit a query best.

        Args:
            query: What is looked for; a string is a text, and `Asked` was encoded before.
            count: Images that are wanted, 1 or more.
            where: Conditions that they must fulfil, as for `Selection`.
            least_strength: Leave out hits that are weaker, in [0, 1].
            hybrid: Rank by the words of the captions too, joined by reciprocal ranks.

        Raises:
            ModeclipError: A condition is none, the expert is unknown, a number is out of range, or words of captions
                are wanted for a query without a text.
        """
        query = Query(text=query) if isinstance(query, str) else query
        _check_wanted(count, least_strength)
        if hybrid and query.text is None:
            raise ModeclipError(
                "search: hybrid needs a text, whose words are looked for in the captions; got a picture"
            )
        asked = query if isinstance(query, Asked) else encode_query(self.model, query)
        vector, weights = self._vector(asked), asked.weights
        chosen = self._chosen(where)
        searched = len(self) if chosen is None else int(chosen.sum())
        approximate = self.approximate
        if approximate is not None and chosen is None:
            wanted = max(count, FUSED_FROM if hybrid else 0)
            rows = self._candidates.best(self.rows, vector, wanted, approximate.looked_at)
        else:
            rows = self.rows.best(vector[None], max(count, FUSED_FROM if hybrid else 0), chosen)[0][0]
        if hybrid:
            assert query.text is not None
            rows = self._fuse(rows, query.text, chosen)
        is_exact = approximate is None or chosen is not None
        return self._found(rows[:count], vector, weights, least_strength, searched, is_exact)

    def search_together(self, queries: Sequence[Asked], *, count: int = 10, least_strength: float = 0.0) -> list[Found]:
        """Find the images that fit each of several queries best, in one pass over the vectors if all are compared.

        Args:
            queries: What is looked for, encoded; each is answered as `search` answers it alone.
            count: As for `search`.
            least_strength: As for `search`.

        Raises:
            ModeclipError: A number is out of range.
        """
        if len(queries) < 2 or self.approximate is not None:
            return [self.search(asked, count=count, least_strength=least_strength) for asked in queries]
        _check_wanted(count, least_strength)
        vectors = [self._vector(asked) for asked in queries]
        best, _ = self.rows.best(np.stack(vectors), count)
        return [
            self._found(rows, vector, asked.weights, least_strength, len(self), True)
            for rows, vector, asked in zip(best, vectors, queries, strict=True)
        ]

    def read(self, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return columns of some rows of the index.

        Raises:
            ModeclipError: There is no such row or column.
        """
        for column in columns:
            if column not in self.columns:
                raise unknown(f"column of {self.folder}", column, self.columns)
        for number in numbers:
            if not 0 <= number < len(self):
                raise ModeclipError(f"index {self.folder}: expected a row from 0 to {len(self) - 1:,}, got {number}")
        found: list[dict[str, Any]] = self._take(columns, np.array(numbers, np.int64)).to_pylist()
        return found

    def encoded_picture(self, number: int) -> bytes:
        """Return the encoded image of a row, as the catalog has it.

        Raises:
            ModeclipError: There is no such row, the catalog is gone, or it holds another pair there.
        """
        (pair,) = self.read([number], ["key", "catalog", "row"])
        path, row = self.catalogs[pair["catalog"]], np.array([pair["row"]])
        if path not in self._opened:
            self._opened[path] = Catalog.open(path)
        catalog = self._opened[path]
        try:
            self._check_places(catalog, pair["catalog"], row, [pair["key"]])
        except ModeclipError:
            del self._opened[path]
            raise
        return catalog.encoded_images(row)[0]

    def pictures(self, hits: Sequence[Hit]) -> list[Image]:
        """Return the pictures of some hits.

        Raises:
            ModeclipError: A catalog is gone, or holds another pair in the place of a hit.
        """
        found: list[Any] = [None] * len(hits)
        for path in dict.fromkeys(hit.catalog for hit in hits):
            places = [place for place, hit in enumerate(hits) if hit.catalog == path]
            catalog, rows = Catalog.open(path), np.array([hits[place].row for place in places])
            self._check_places(catalog, self.catalogs.index(path), rows, [hits[place].key for place in places])
            for place, picture in zip(places, catalog.images(rows), strict=True):
                found[place] = picture
        return found

    def _found(
        self,
        rows: Int[np.ndarray, " k"],
        vector: Float[np.ndarray, " D"],
        weights: Float[np.ndarray, " K"],
        least_strength: float,
        searched: int,
        is_exact: bool,
    ) -> Found:
        hits = self._hits(rows, vector)
        return Found(
            hits=tuple(hit for hit in hits if hit.strength >= least_strength),
            weights=tuple(weights.tolist()),
            experts=self.model.names,
            num_searched=searched,
            exact=is_exact,
        )

    def _vector(self, asked: Asked) -> Float[np.ndarray, " D"]:
        """Return the one vector that a query is."""
        if len(asked.parts) == 1:
            return asked.parts[0][1]
        total: np.ndarray = np.sum([w / self._spread(vector)[1] * vector for w, vector in asked.parts], axis=0)
        return total

    def _spread(self, vector: Float[np.ndarray, " D"]) -> tuple[float, float]:
        """Return mean and standard deviation of a query's scores over the index."""
        scores = self._sample @ vector
        return float(scores.mean()), float(_spread_of(scores, np.linalg.norm(vector)))

    @cached_property
    def _sample(self) -> Float[np.ndarray, "n D"]:
        """Vectors of rows that are spread over the whole index."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(np.int64))
        column = self._take([VECTOR], rows)[VECTOR].combine_chunks()
        return np.asarray(column.flatten()).reshape(len(column), -1).astype(np.float32)

    def _hits(self, rows: Int[np.ndarray, " k"], vector: Float[np.ndarray, " D"]) -> list[Hit]:
        if not len(rows):
            return []
        table = self._take([*FIXED, VECTOR], rows)
        vectors = np.asarray(table[VECTOR].combine_chunks().flatten()).reshape(len(rows), -1).astype(np.float32)
        ends = np.cumsum(self.model.sizes)[:-1]
        parts = np.stack([part.sum(axis=1) for part in np.split(vectors * vector, ends, axis=1)], axis=1)
        mean, spread = self._spread(vector)
        heights = (parts.sum(axis=1) - mean) / spread
        strengths = np.interp(heights, self._content["heights"], np.linspace(0, 1, LEVELS))
        return [
            Hit(
                number=number,
                key=pair["key"],
                caption=pair["caption"],
                path=pair["path"],
                score=float(own.sum()),
                height=float(height),
                strength=float(strength),
                parts=tuple(own.tolist()),
                catalog=self.catalogs[pair["catalog"]],
                row=pair["row"],
            )
            for number, pair, own, height, strength in zip(
                rows.tolist(),
                table.drop_columns([VECTOR, "digest"]).to_pylist(),
                parts,
                heights,
                strengths,
                strict=True,
            )
        ]

    def _fuse(
        self, rows: Int[np.ndarray, " n"], text: str, chosen: Bool[np.ndarray, " N"] | None
    ) -> Int[np.ndarray, " m"]:
        """Join a ranking by vectors with one by the words of captions: sum of 1 / (60 + rank)."""
        limit = None if chosen is not None else FUSED_FROM
        with self._reading():
            words = self._dataset.to_table(columns=["_rowoffset", "_score"], full_text_query=text, limit=limit)
        ranked = np.asarray(words["_rowoffset"], np.int64)
        if chosen is not None:
            ranked = ranked[chosen[ranked]][:FUSED_FROM]
        scores: dict[int, float] = {}
        for ranking in (rows, ranked):
            for rank, row in enumerate(ranking.tolist(), 1):
                scores[row] = scores.get(row, 0.0) + 1 / (FUSED + rank)
        return np.array(sorted(scores, key=lambda row: -scores[row]), np.int64)

    def _chosen(self, where: Sequence[str]) -> Bool[np.ndarray, " N"] | None:
        """Return which rows fulfil conditions; None: all."""
        if not where:
            return None
        return Selection(where=tuple(where)).mask_of(Catalog(self._dataset, self.folder))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with _reading_rows(self.folder):
                yield
        except DamagedError:
            self._check_unchanged()
            raise

    def _check_unchanged(self) -> None:
        """Raise if what was opened is no longer there, since the index was changed twice or built anew."""
        if _read_note(self.folder).get("version") != self._content["version"]:
            raise ModeclipError(f"index {self.folder}: it has changed since it was opened; open it again") from None

    def _check_places(self, catalog: Catalog, number: int, rows: Int[np.ndarray, " n"], keys: Sequence[str]) -> None:
        """Raise unless the catalog of a number has the pairs of the index where they were when they were indexed."""
        found = catalog.read(["key"], np.minimum(rows, len(catalog) - 1))["key"]
        for row, key, other in zip(rows.tolist(), keys, found.tolist(), strict=True):
            if row < len(catalog) and key == other:
                continue
            word = "key = '" + key.replace("'", "''") + "'"
            word += f" AND catalog = {number}" if len(self.catalogs) > 1 else ""
            is_there = len(catalog.select(key=key)) > 0
            remedy = f"add {self.folder} {catalog.path}" if is_there else f'remove {self.folder} --where "{word}"'
            raise ModeclipError(
                f"index {self.folder}: {catalog.path} {'has' if is_there else 'no longer has'} the pair {key!r}"
                f"{' in another row' if is_there else ''} since it was indexed again; give modeclip search {remedy}"
            )

    def _take(self, columns: Sequence[str], rows: Int[np.ndarray, " n"]) -> pa.Table:
        with self._reading():
            table: pa.Table = self._dataset.take(rows.tolist(), columns=list(columns))
        return table


def drop_outdated(folder: Path, catalog: Path, model: SearchModel) -> bool:
    """Drop an index that modeclip has built of a catalog itself, if its model has changed since; say whether it did.

    What opened it goes on, and `Index.build` builds it anew.

    Raises:
        ModeclipError: The index cannot be opened, or is another one: of another model or catalog, or with settings.
    """
    if not (folder / INDEX_FILE).is_file():
        return False
    try:
        Index.open(folder, model)
    except OtherModelError:
        content = _read_note(str(folder))
        is_own = content["catalogs"] == [str(catalog.resolve())] and content["config"] == asdict(SearchConfig())
        if not is_own or Path(_found_model(str(folder), content["model"])).resolve() != Path(model.spec).resolve():
            raise
        with _alone(str(folder)):
            (folder / INDEX_FILE).unlink(missing_ok=True)
        return True
    return False


def _check_note(folder: str, content: Mapping[str, Any]) -> None:
    """Raise unless ``index.json`` holds what it must, as far as it can be told without the rows."""
    if missing := [name for name in CONTENT if name not in content]:
        raise DamagedError(f"index {folder}: {INDEX_FILE} has no {missing[0]}; delete the folder and {_AGAIN}")
    heights, wrong = content["heights"], ""
    if not isinstance(heights, list) or len(heights) != LEVELS or not all(isinstance(each, float) for each in heights):
        wrong = f"heights: expected {LEVELS} numbers, got {str(heights)[:60]}"
    try:
        SearchConfig(**content["config"])
    except (TypeError, ValueError) as error:
        wrong = f"config: {error}"
    if wrong:
        raise DamagedError(f"index {folder}: {INDEX_FILE}: {wrong}; delete the folder and {_AGAIN}")


@contextmanager
def _reading_rows(folder: str) -> Iterator[None]:
    """Turn whatever Lance and Arrow raise for rows that are damaged or gone into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise DamagedError(
            f"index {folder}: {ROWS_FOLDER} cannot be read ({' '.join(str(error).split())[:200]}); delete the"
            f" folder and {_AGAIN}"
        ) from error


def _check_wanted(count: int, least_strength: float) -> None:
    if count < 1:
        raise ModeclipError(f"search: count must be 1 or more, got {count}")
    if not 0 <= least_strength <= 1:
        raise ModeclipError(f"search: least_strength must lie in [0, 1], got {least_strength}")


def _place(folder: Path | str) -> str:
    """Return where an index lies: an address as it is, or a path of this machine."""
    return str(folder).rstrip("/") if is_url(str(folder)) else str(home_path(folder))


def _holds_more(folder: str) -> bool:
    """Say whether a folder holds anything besides an index that was not finished."""
    if is_url(folder):
        folders, files = list_folder(folder)
        names = [*folders, *files]
    else:
        names = [path.name for path in Path(folder).iterdir()] if Path(folder).exists() else []
    return any(name not in {ROWS_FOLDER, LOCK_FILE} and not name.startswith(CANDIDATES_PREFIX) for name in names)


def _read_note(folder: str) -> dict[str, Any]:
    """Return what ``index.json`` says, with catalogs where they lie now; errors as for `read_json`."""
    path = join(folder, INDEX_FILE)
    if is_url(path):
        try:
            content = parse_json(read_bytes(path), dict[str, Any])
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: damaged ({' '.join(str(error).split())}); {_AGAIN}") from None
    else:
        content = read_json(Path(path), dict[str, Any], _AGAIN)
    if "catalogs" not in content:
        return content
    try:
        named = list(map(str, content["catalogs"]))
        places = content.get("places", [""] * len(named))  # an earlier modeclip has noted none
        return content | {"catalogs": [_found_place(folder, *each) for each in zip(places, named, strict=True)]}
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path}: catalogs are damaged ({error}); delete the folder and {_AGAIN}") from None


def _from(folder: str, path: str) -> str:
    """Return where a file or folder of this machine lies from an index of this machine; empty: it is elsewhere."""
    if is_url(folder) or is_url(path) or not Path(path).exists():
        return ""
    return os.path.relpath(Path(path).resolve(), Path(folder).resolve())


def _found_place(folder: str, place: str, path: str) -> str:
    """Return the path of what an index was made from, which may have moved together with it.

    Args:
        folder: The index.
        place: Where it lay from the index, as `_from` says it; empty: nobody has noted it.
        path: Its path as a whole.
    """
    if is_url(folder) or is_url(path):
        return path
    # what lies beside the index is looked at last, and for an index of an earlier modeclip alone
    beside = "" if place or Path(path).exists() else f"../{Path(path).name}"
    found = Path(folder, place or beside or ".").resolve()
    return str(found) if (place or beside) and found.exists() else path


def _found_model(folder: str, about: Mapping[str, Any]) -> str:
    """Return the specification of the model of an index, as `_found_place` returns a path."""
    path, member = split_expert(about["spec"])
    if ":" not in path and "@" not in path:
        path = _found_place(folder, about.get("place", ""), path)
    return f"{path}#{member}" if member else path


def _whole_spec(spec: str) -> str:
    """Return the specification of a model with its path as a whole, if it is a folder or has a file of weights."""
    place, member = split_expert(spec)
    end, path = f"#{member}" if member else "", Path(place.removeprefix("local-dir:"))
    if path.exists():
        return f"{path.resolve()}{end}"
    name, _, file = place.partition("@")
    return f"{name}@{Path(file).resolve()}" if file and Path(file).is_file() else spec


def _write_file(path: str, content: bytes) -> None:
    """Write a file of an index as a whole."""
    if not is_url(path):
        write_atomically(Path(path), content)
        return
    with reaching(path):
        filesystem(path).pipe_file(path, content)


def _delete_candidates(folder: str, kept: set[str]) -> None:
    """Delete the approximate indexes of earlier versions but for those that are kept."""
    names = list_folder(folder)[1] if is_url(folder) else [path.name for path in Path(folder).iterdir()]
    for name in names:
        if name.startswith(CANDIDATES_PREFIX) and name not in kept:
            path = join(folder, name)
            if is_url(path):
                filesystem(path).rm_file(path)
            else:
                Path(path).unlink()


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Let no other process of this machine change an index; in an object store only Lance's commits protect it."""
    with writing(folder):
        if is_url(folder):
            yield
            return
        with only_process(Path(folder)):
            yield


def _add(
    folder: str,
    model: SearchModel,
    catalog: Catalog,
    config: SearchConfig | None,
    selection: Selection,
    ray: bool,
) -> Added:
    """Encode what the index lacks of a catalog, and write it; a new index where there is none.

    Without a config the index answers as before.
    """
    with _alone(folder):
        is_new = config is not None and not state(join(folder, INDEX_FILE))
        index = None if is_new else Index.open(folder, model)
        content: dict[str, Any] = {"format": FORMAT, "catalogs": [], "version": 0}
        content |= {} if index is None else index._content
        before = content.get("config")
        spec = _whole_spec(model.spec)
        place = _from(folder, split_expert(spec)[0])
        content["model"] = {"spec": spec, "place": place, "names": list(model.names), **model.facts()}
        content["config"] = before if config is None else asdict(config)
        dataset = None if index is None else _latest(folder, content["version"])
        path = catalog.path if is_url(catalog.path) else str(Path(catalog.path).resolve())
        catalogs = content["catalogs"] + ([] if path in content["catalogs"] else [path])
        number = catalogs.index(path)
        chosen, moved, counts = _missing(folder, catalog, selection, dataset, number)
        if chosen.any() or moved:
            content["catalogs"] = catalogs
            work = EncodeImages(
                spec=model.spec,
                facts={"work": "search", **model.facts()},
                exif=catalog.exif,
                encoder=model.mode.bundle.encoder if model.mode and model.mode.bundle.trust_encoder else None,
                trusted=bool(model.mode and model.mode.bundle.trust_encoder),
            )
            if not ray:
                work._model = model
            encoded = map_fragments(catalog, work, "encode images", ray=ray, selected=chosen)
            schema = _schema(catalog, sum(model.sizes))
            if dataset is not None:
                dataset, schema = _with_columns(dataset, schema)
            batches = _batches(catalog, chain(_vectors_at(dataset, moved), encoded), schema, number)
            has_old = counts["num_changed"] + len(moved) > 0
            dataset = _write(folder, dataset, schema, batches, has_old=has_old)
            _finish(folder, dataset, model, content)
            encoded.forget()
        elif dataset is None:
            raise ModeclipError(f"catalog {catalog.path!r} has no pair to search; index some, or select others")
        elif content["config"] != before:
            _finish(folder, dataset, model, content)
        return Added(**counts, num_rows=int(dataset.count_rows()))


def _missing(
    folder: str, catalog: Catalog, selection: Selection, dataset: Any, number: int
) -> tuple[Bool[np.ndarray, " N"], dict[int, int], dict[str, int]]:
    """Compare an index with a catalog, which is its catalog of a number.

    Returns:
        Which rows of the catalog the index lacks or has with another image; those whose image it has, but as of
        another row or with other columns, with their positions in the index; and the counts.
    """
    known: dict[tuple[int, str], int] = {}
    elsewhere = set[tuple[str, bytes]]()
    if dataset is not None:
        with _reading_rows(folder):
            old = dataset.to_table(columns=["key", "digest", "catalog", "row"])
        keys, digests, numbers, places = (old[name].to_pylist() for name in ("key", "digest", "catalog", "row"))
        known = {pair: place for place, pair in enumerate(zip(numbers, keys, strict=True))}
        elsewhere = set(zip(keys, digests, strict=True))
    rows = selection.rows(catalog)
    pairs = catalog.read(["key", "digest"], rows)
    chosen = np.zeros(len(catalog), bool)
    moved: dict[int, int] = {}
    same: dict[int, int] = {}
    counts = {"num_new": 0, "num_changed": 0, "num_moved": 0, "num_same": 0, "num_doubled": 0}
    seen = set[str]()
    for row, key, digest in zip(rows.tolist(), pairs["key"].tolist(), pairs["digest"].tolist(), strict=True):
        if key in seen:
            counts["num_doubled"] += 1
            continue
        seen.add(key)
        place = known.get((number, key))
        if place is None:
            kind = "same" if (key, digest) in elsewhere else "new"  # another catalog has this very image
        elif digests[place] != digest:
            kind = "changed"
        elif places[place] != row:
            kind, moved[row] = "moved", place
        else:
            kind, same[row] = "same", place
        counts[f"num_{kind}"] += 1
        chosen[row] = kind in ("new", "changed")
    if counts["num_doubled"]:
        log(f"{counts['num_doubled']:,} pairs have the key of an earlier pair of {catalog.path}; they are left out")
    edited = _edited(folder, catalog, dataset, same)
    counts["num_same"] -= len(edited)
    counts["num_edited"] = len(edited)
    return chosen, moved | edited, counts


def _edited(folder: str, catalog: Catalog, dataset: Any, pairs: Mapping[int, int]) -> dict[int, int]:
    """Return those rows of a catalog, with their positions in an index, of which the index has other columns."""
    if not pairs:
        return {}
    names = [name for name in _own_columns(catalog, dataset.schema) if name not in {"key", "digest"}]
    if set(_schema(catalog, 1).names) - set(dataset.schema.names):
        return dict(pairs)
    rows, places, found = list(pairs), list(pairs.values()), dict[int, int]()
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        new = catalog.dataset.take(rows[part], columns=names)
        with _reading_rows(folder):
            old = dataset.take(places[part], columns=names)
        differs = np.zeros(len(new), bool)
        for name in names:
            one, other = _cast(new[name], dataset.schema.field(name), catalog), old[name].combine_chunks()
            if pa.types.is_float16(one.type):  # which Arrow cannot compare
                one, other = one.cast(pa.float32()), other.cast(pa.float32())
            equal = pc.fill_null(pc.equal(one, other), False)
            both = pc.and_(pc.is_null(one, nan_is_null=True), pc.is_null(other, nan_is_null=True))
            differs |= ~np.asarray(pc.or_(equal, both))
        found |= {rows[start + place]: places[start + place] for place in np.flatnonzero(differs).tolist()}
    return found


def _own_columns(catalog: Catalog, schema: pa.Schema) -> list[str]:
    """Return the columns of an index that it takes from a catalog as they are."""
    made = {"catalog", "row", VECTOR}
    return [
        name for name in schema.names if name not in made and name in catalog.columns and name not in catalog.damaged
    ]


def _cast(column: pa.ChunkedArray, item: pa.Field, catalog: Catalog) -> pa.Array:
    """Return a column of a catalog in the type that the index has it in.

    Raises:
        ModeclipError: It cannot be.
    """
    try:
        return column.combine_chunks().cast(item.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ModeclipError(
            f"catalog {catalog.path}: column {item.name!r} has the type {column.type}, and the index has it as "
            f"{item.type}; build the index in another folder"
        ) from None


def _vectors_at(dataset: Any, moved: Mapping[int, int]) -> Iterator[dict[str, Shaped[np.ndarray, "..."]]]:
    """Yield rows of a catalog with their vectors, which an index has at some positions."""
    rows, places = list(moved), list(moved.values())
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        column = dataset.take(places[part], columns=[VECTOR])[VECTOR].combine_chunks()
        yield {"rows": np.array(rows[part]), VECTOR: np.asarray(column.flatten()).reshape(len(column), -1)}


def _schema(catalog: Catalog, dimension: int) -> pa.Schema:
    """Return the columns of an index: those that every one has, what a condition can be about, and the vector."""
    plain = [
        pa.field(name, catalog.dataset.schema.field(name).type)
        for name in catalog.columns
        if name not in LEFT_OUT and name not in catalog.damaged and _is_plain(catalog.dataset.schema.field(name).type)
    ]
    fixed = [pa.field(name, kind) for name, kind in FIXED.items()]
    return pa.schema([*fixed, *plain, pa.field(VECTOR, pa.list_(pa.float16(), dimension))])


def _with_columns(dataset: Any, schema: pa.Schema) -> tuple[Any, pa.Schema]:
    """Give an index the columns of a schema that it lacks, without values, and return it with its own schema."""
    if new := [item for item in schema if item.name not in dataset.schema.names]:
        dataset.add_columns(pa.schema(new))
    return dataset, dataset.schema


def _is_plain(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_integer,
            pa.types.is_floating,
            pa.types.is_boolean,
        )
    )


def _batches(catalog: Catalog, encoded: Any, schema: pa.Schema, number: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the index for what was encoded of a catalog."""
    own = _own_columns(catalog, schema)
    for arrays in encoded:
        for start in range(0, len(arrays["rows"]), ROWS_AT_ONCE):
            rows = arrays["rows"][start : start + ROWS_AT_ONCE]
            vectors = arrays[VECTOR][start : start + ROWS_AT_ONCE]
            table = catalog.dataset.take(rows.tolist(), columns=own)
            values = {name: _cast(table[name], schema.field(name), catalog) for name in own}
            values["catalog"] = pa.array(np.full(len(rows), number, np.int16))
            values["row"] = pa.array(rows)
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            values[VECTOR] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            columns = [values[item.name] if item.name in values else pa.nulls(len(rows), item.type) for item in schema]
            yield pa.record_batch(columns, schema=schema)


def _write(folder: str, dataset: Any, schema: pa.Schema, batches: Iterator[pa.RecordBatch], *, has_old: bool) -> Any:
    import lance

    place, reader = join(folder, ROWS_FOLDER), pa.RecordBatchReader.from_batches(schema, batches)
    if dataset is None:
        stopped = exists(place) if is_url(place) else Path(place).exists()
        mode: Literal["create", "overwrite"] = "overwrite" if stopped else "create"
        return lance.write_dataset(reader, place, mode=mode, enable_stable_row_ids=True)
    if has_old:
        dataset.merge_insert(["catalog", "key"]).when_matched_update_all().when_not_matched_insert_all().execute(reader)
        return dataset
    return lance.write_dataset(reader, dataset, mode="append")


def _latest(folder: str, version: int) -> Any:
    """Return the dataset as index.json names it, and make it the newest: later versions were never finished."""
    import lance

    dataset: Any = lance.dataset(join(folder, ROWS_FOLDER))
    if dataset.version != version:
        dataset = dataset.checkout_version(version)
        dataset.restore()
    return dataset


def _finish(folder: str, dataset: Any, model: SearchModel, content: Mapping[str, Any]) -> None:
    """Bring what belongs to the rows up to date, and show all of it at once by writing ``index.json``."""
    config = SearchConfig(**content["config"])
    if any(one.name == "caption_idx" for one in dataset.describe_indices()):
        dataset.optimize.optimize_indices()
    else:
        dataset.create_scalar_index("caption", "INVERTED")
    new = dict(content) | {"version": dataset.version, "heights": [0.0] * LEVELS, "approximate": None}
    index = Index(folder, new, model)
    new["heights"] = _known_heights(index)
    if len(index) > config.exact_up_to:
        texts = _some_captions(index)[1]
        weights = model.weigh(texts)
        if found := build_approximate(index.rows, model.encode_texts(texts, weights), config.recall):
            facts = replace(found[0], file=f"{CANDIDATES_PREFIX}{dataset.version}.faiss")
            _write_file(join(folder, facts.file), found[1].to_bytes())
            new["approximate"] = asdict(facts)
    new["places"] = [_from(folder, catalog) for catalog in new["catalogs"]]
    _write_file(join(folder, INDEX_FILE), to_json(new, indent=2).encode())
    dataset.cleanup_old_versions(older_than=KEEP_VERSIONS)
    # the one before stays for those who have opened it
    _delete_candidates(folder, {(each.get("approximate") or {}).get("file", "") for each in (content, new)})


def _some_captions(index: Index) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Return rows spread over the index, and their captions, those that have one."""
    rows = np.unique(np.linspace(0, len(index) - 1, min(KNOWN_PAIRS, len(index))).astype(np.int64))
    captions = index._take(["caption"], rows)["caption"].to_pylist()
    kept = [place for place, caption in enumerate(captions) if caption and caption.strip()]
    return rows[kept], [captions[place] for place in kept]


def _spread_of(
    scores: Float[np.ndarray, " n *Q"], norms: Float[np.ndarray, " *Q"] | np.floating[Any]
) -> Float[np.ndarray, " *Q"]:
    """Return the standard deviation of the scores of queries with some norms; 1 where the images are all alike."""
    spread = scores.std(axis=0)
    return np.where(spread > LEAST_SPREAD * norms, spread, 1.0)


def _known_heights(index: Index) -> list[float]:
    """Return the quantiles of how high captions are with their own images; 0 where there are no captions."""
    rows, texts = _some_captions(index)
    if not texts:
        return [0.0] * LEVELS
    vectors = index.model.encode_texts(texts, index.model.weigh(texts))
    column = index._take([VECTOR], rows)[VECTOR].combine_chunks()
    images = np.asarray(column.flatten()).reshape(len(rows), -1).astype(np.float32)
    scores = index._sample @ vectors.T
    spread = _spread_of(scores, np.linalg.norm(vectors, axis=1))
    heights = ((images * vectors).sum(axis=1) - scores.mean(axis=0)) / spread
    return [float(value) for value in np.quantile(heights, np.linspace(0, 1, LEVELS))]
