"""What a service is made of: the model with its answers, the indexes, the run that they come from; opened and reloaded.

``modeclip serve`` takes the folder of a run, a bundle, or a model. Of a run it serves the bundle and the index of its
pairs, which it builds at the first start. A watcher compares what lies on disk once a second: when the bundle or an
index was written anew, it is opened and tried beside what answers now, and takes its place if it works. If it does not,
or is gone, the service goes on with what it has in memory and says so in ``trouble``.
"""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from modeclip.errors import ModeclipError, in_one_line, unknown
from modeclip.mixture.manifest import MANIFEST_FILE, split_expert
from modeclip.search.asking import SearchModel
from modeclip.search.exact import TOGETHER
from modeclip.search.index import INDEX_FILE, Index, drop_outdated
from modeclip.search.query import Asked, Found
from modeclip.serving.answers import Answers
from modeclip.serving.batching import Batcher
from modeclip.serving.limits import Limits, RefusedError
from modeclip.serving.shapes import Health
from modeclip.system.console import log
from modeclip.system.paths import RunPaths, expand_homes, is_url

if TYPE_CHECKING:
    from PIL.Image import Image

Result = TypeVar("Result")

WEB = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}
"""Formats that every browser shows."""

SMALL_LETTERS, SMALL_PIXELS = 1 << 16, 1 << 16
"""Pictures of a request that are decoded at once, in base64 and decoded: handing them to a thread would take longer."""
State = tuple[tuple[str, int, int, int], ...]
"""Which files there are, with time, size and inode."""
Wanted = tuple[Asked, tuple[Index, int, float]]
"""An encoded query with the index that is searched, the number of hits that are wanted, and their least strength."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is served, and how it is opened."""

    name: str
    """What clients call the model."""
    model: str
    """A bundle, a model folder or a name, as `SearchModel.open` takes it."""
    run: Path | None = None
    """The folder of the run, if it is one."""
    indexes: Mapping[str, str]
    """Folder or address of each index by name."""
    is_bundle: bool = False
    """Whether the model was a bundle when the service began."""
    device: str = "auto"
    encoder: str | None = None
    trust_encoder: bool = False
    max_memory: int | None = None
    """Bytes that the weights of experts may take."""

    def open(self, limits: Limits) -> tuple[Answers, dict[str, Index]]:
        """Open the model and its indexes.

        Raises:
            ModeclipError: There is no such model or index, or an index is of another model.
        """
        place = Path(split_expert(self.model)[0])
        if self.is_bundle and not (place / MANIFEST_FILE).is_file():
            raise ModeclipError(f"bundle {place}: {MANIFEST_FILE} is missing; get the bundle again")
        model = SearchModel.open(
            self.model,
            device=self.device,
            encoder=self.encoder,
            trust_encoder=self.trust_encoder,
            max_memory=self.max_memory,
        )
        indexes = {name: Index.open(folder, model) for name, folder in self.indexes.items()}
        for index in indexes.values():
            index.search(Asked(weights=model.shares()[0], parts=((1.0, np.ones(sum(model.sizes), np.float32)),)))
        return Answers(model, limits), indexes

    def state(self) -> State:
        """Return what lies on disk; whatever changes it was written anew. In an object store nobody looks."""
        folder = Path(split_expert(self.model)[0])
        watched = [folder / MANIFEST_FILE] if (folder / MANIFEST_FILE).is_file() else []
        if not watched and folder.is_dir():
            watched = sorted(path for path in folder.iterdir() if path.is_file())
        found = []
        indexes = [Path(place, INDEX_FILE) for place in self.indexes.values() if not is_url(place)]
        for path in [*watched, *indexes]:
            try:
                about = path.stat()
            except OSError:
                continue
            found.append((str(path), about.st_mtime_ns, about.st_size, about.st_ino))
        return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """What answers at a moment. A request takes it once, and is answered by the same model and index throughout."""

    answers: Answers
    indexes: Mapping[str, Index]
    number: int
    """How many there were before."""
    opened: float
    """When, in seconds since 1970."""

    def index(self, name: str | None = None) -> tuple[str, Index]:
        """Return an index by its name, or the first.

        Raises:
            RefusedError: There is none of this name, or none at all.
        """
        if not self.indexes:
            raise RefusedError("no index is served; start the service with --index INDEX", 409)
        if name is None:
            return next(iter(self.indexes.items()))
        if name not in self.indexes:
            raise RefusedError(str(unknown("index", name[:100], self.indexes)), 404)
        return name, self.indexes[name]


class Service:
    """Everything that the routes share."""

    def __init__(self, source: Source, limits: Limits, *, dimension: int | None = None) -> None:
        """Open it.

        Args:
            source: What is served.
            limits: What clients may ask.
            dimension: Numbers of an embedding, zeros appended; None: as many as the model has.

        Raises:
            ModeclipError: As for `Source.open`, or the model's embeddings are longer.
        """
        self.source, self.limits, self.began = source, limits, time.time()
        self.dimension = dimension
        self.is_ending = False
        """Whether it takes no new requests."""
        self.trouble = ""
        """Why what lies on disk is not what answers; empty: it is."""
        self._state, self._lock = source.state(), Lock()
        self._before: tuple[weakref.ref[Answers], float] | None = None
        self._readers = ThreadPoolExecutor(2, "pictures")
        self._searchers = ThreadPoolExecutor(2, "search")
        self.search_batches = Batcher[Wanted, Found](
            _search_together, self._searchers, most=TOGETHER, waiting=limits.max_waiting
        )
        answers, indexes = source.open(limits)
        if dimension is not None and dimension < answers.dimension:
            raise ModeclipError(
                f"--dimension {dimension:,}: the model's embeddings have {answers.dimension:,} numbers, and zeros can"
                " only be appended; give at least that"
            )
        if source.max_memory is None:
            answers.try_out(stay=True)
        self.now = Snapshot(answers=answers, indexes=indexes, number=0, opened=self.began)

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.source.name

    @property
    def answers(self) -> Answers:
        """The model that answers now."""
        return self.now.answers

    @property
    def indexes(self) -> Mapping[str, Index]:
        """The indexes that are searched now."""
        return self.now.indexes

    @property
    def run(self) -> Path | None:
        """The folder of the run, if one is served."""
        return self.source.run

    @property
    def catalog(self) -> Path | None:
        """The catalog of the run's training pairs."""
        place = None if self.run is None else RunPaths(folder=self.run).catalog_path
        return place if place is not None and place.exists() else None

    def health(self, status: str) -> Health:
        """Return how the service is."""
        return Health(
            status=status, model=self.name, trouble=self.trouble, uptime_seconds=round(time.time() - self.began, 3)
        )

    def reload(self, *, always: bool = True) -> bool:
        """Open anew what lies on disk, and answer with it from now on; return whether that was done.

        Args:
            always: Do it although nothing has changed, and nothing was wrong.
        """
        with self._lock:
            self._let_go()
            try:
                state = self.source.state()
                if not always and state == self._state and not self.trouble:
                    return False
                answers, indexes = _guarded(self.source.open, self.limits)
                _guarded(answers.try_out, stay=self.source.max_memory is None)
            except Exception as error:  # what libraries raise for damaged files must not end the watcher
                trouble = in_one_line(error) if isinstance(error, OSError) else " ".join(str(error).split())
                trouble = trouble or type(error).__name__
                if trouble != self.trouble:
                    log(f"not reloaded, the service goes on with what it has: {trouble}")
                self.trouble = trouble
                return False
            self._state, self.trouble, before = state, "", self.now
            self.now = Snapshot(answers=answers, indexes=indexes, number=before.number + 1, opened=time.time())
            self._before = weakref.ref(before.answers), time.monotonic() + self.limits.timeout_seconds
            del before
            _collect()  # the model before, unless a request still asks it
            log(f"reloaded {self.source.model}")
            return True

    def _let_go(self) -> None:
        """Free the model before, if a request still asked it when it was replaced: by now none does."""
        if self._before is None or time.monotonic() < self._before[1]:
            return
        before, self._before = self._before[0], None
        if before() is not None:
            _collect()

    # ---------------------------------------------------------------- pictures

    async def read_pictures(self, what: str, texts: Sequence[str], now: Snapshot) -> list[Image]:
        """Return pictures in base64 in the size that the image towers take.

        Args:
            what: What the client calls them.
            texts: The pictures.
            now: What will look at them.

        Raises:
            RefusedError: One is an address, too large, or no picture.
        """
        return await self._read(what, texts, now.answers.prepare)

    async def open_pictures(self, what: str, texts: Sequence[str]) -> list[Image]:
        """Return pictures in base64, in RGB; arguments and errors as for `read_pictures`."""
        return await self._read(what, texts, _itself)

    async def decode_picture(self, what: str, data: bytes) -> Image:
        """Return the picture in the bytes of a file, in RGB; errors as for `read_pictures`."""

        def decode() -> Image:
            self.limits.measure(what, data)
            return self.limits.decode(what, data)

        return await self._in(self._readers, decode)

    async def picture(self, index: Index, number: int, size: int | None = None) -> tuple[bytes, str]:
        """Return a picture of an index as a browser shows it, and its media type.

        Args:
            index: The index.
            number: Position in it.
            size: Pixels of the longer side; None: as it is.

        Raises:
            RefusedError: The picture is not where it was indexed.
        """
        try:
            return await self._in(self._readers, _for_browsers, index, number, size)
        except ModeclipError as error:
            raise RefusedError(str(error), 503) from None
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            reason = " ".join(str(error).split())[:200]
            raise RefusedError(f"picture {number} of the index cannot be shown ({reason})", 503) from None

    async def prepare(self, picture: Image, now: Snapshot) -> Image:
        """Return a picture in the size that the image towers take."""
        return await self._in(self._readers, now.answers.prepare, picture)

    # ---------------------------------------------------------------- search

    async def read_rows(self, index: Index, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read rows of an index; arguments and errors as for `Index.read`."""
        return await self._in(self._searchers, _reading(index), lambda: index.read(numbers, columns))

    async def search(
        self,
        index: Index,
        asked: Asked,
        *,
        count: int = 10,
        where: Sequence[str] = (),
        least_strength: float = 0.0,
        hybrid: bool = False,
    ) -> Found:
        """Search an index, together with whoever searches it now; arguments and errors as for `Index.search`.

        Under conditions, where words of captions are looked for too, and where not all vectors are compared, there is
        no pass that several could share: such a query is a search of its own.
        """
        if where or hybrid or index.approximate is not None:
            work = partial(index.search, asked, count=count, where=where, least_strength=least_strength, hybrid=hybrid)
            return await self._in(self._searchers, _reading(index), work)
        return (await self.search_batches.ask([(asked, (index, count, least_strength))]))[0]

    def close(self) -> None:
        """Compute no more."""
        self.now.answers.retire()
        for pool in (self._readers, self._searchers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _read(self, what: str, texts: Sequence[str], then: Callable[[Image], Result]) -> list[Result]:
        limits = self.limits
        if len(texts) > limits.max_images:
            raise RefusedError(f"{what}: expected at most {limits.max_images:,} pictures, got {len(texts):,}", 413)
        names = [f"{what}[{number}]" for number in range(len(texts))] if len(texts) > 1 else [what]

        def look() -> tuple[list[bytes], int]:
            files = [limits.read_base64(name, text) for name, text in zip(names, texts, strict=False)]
            return files, sum(limits.measure(name, data) for name, data in zip(names, files, strict=False))

        def decode() -> list[Result]:
            return [then(limits.decode(name, data)) for name, data in zip(names, files, strict=False)]

        is_short = sum(map(len, texts)) <= SMALL_LETTERS
        files, pixels = _guarded(look) if is_short else await self._in(self._readers, look)
        if pixels > limits.max_pixels:
            raise RefusedError(f"{what}: {pixels:,} pixels, expected at most {limits.max_pixels:,} together", 413)
        return _guarded(decode) if is_short and pixels <= SMALL_PIXELS else await self._in(self._readers, decode)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., Result], *given: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, _guarded, work, *given)


def _collect() -> None:
    """Free what nobody asks any more, the model that `modeclip.serving.server.serve` has frozen among it."""
    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if is_frozen:
        gc.freeze()


def _guarded(work: Callable[..., Result], *given: Any, **options: Any) -> Result:
    """Do some work, and refuse the request if a library ends it in a way that is none of Python's."""
    try:
        return work(*given, **options)
    except Exception:
        raise
    except BaseException as error:  # a panic of a library in Rust
        raise RefusedError(f"this cannot be computed ({type(error).__name__})", 422) from None


def _search_together(items: Sequence[Wanted]) -> list[Found]:
    """Answer searches; those of an index that want as many hits share a pass over its vectors."""
    groups: dict[tuple[Index, int, float], list[int]] = {}
    for place, (_, options) in enumerate(items):
        groups.setdefault(options, []).append(place)
    found: dict[int, Found] = {}
    for (index, count, least_strength), places in groups.items():
        work = partial(
            index.search_together, [items[place][0] for place in places], count=count, least_strength=least_strength
        )
        found |= zip(places, _guarded(_reading(index), work), strict=True)
    return [found[place] for place in range(len(items))]


def _reading(index: Index) -> Callable[[Callable[[], Result]], Result]:
    """Return what does some work with the files of an index, which may be gone."""

    def work(read: Callable[[], Result]) -> Result:
        try:
            return read()
        except ModeclipError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RefusedError(f"index {index.folder}: cannot be read ({reason}); build it again", 503) from None

    return work


def _itself(picture: Image) -> Image:
    return picture


def _for_browsers(index: Index, number: int, size: int | None) -> tuple[bytes, str]:
    import io

    from PIL import Image

    from modeclip.data.images import decode_image, strict_pillow

    data = index.encoded_picture(number)
    with strict_pillow():
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
        if size is None and kind in WEB:
            return data, WEB[kind]
        picture = decode_image(data)
    if size is not None:
        picture.thumbnail((size, size))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue(), WEB["PNG"]


def open_service(
    what: str | Path,
    *,
    indexes: Sequence[Path | str] = (),
    limits: Limits | None = None,
    device: str = "auto",
    encoder: str | None = None,
    trust_encoder: bool = False,
    max_memory: int | None = None,
    dimension: int | None = None,
) -> Service:
    """Open what is served.

    Args:
        what: The folder of a run, a bundle, a model folder, or the name of a model.
        indexes: Folders of indexes of the same model; none: that of the run, which is built if it is not there, and
            built anew if the bundle has changed.
        limits: What clients may ask.
        device: As for `SearchModel.open`.
        encoder: As for `SearchModel.open`.
        trust_encoder: As for `SearchModel.open`.
        max_memory: Bytes that the weights of experts may take; None: any number.
        dimension: Numbers of an embedding, zeros appended; None: as many as the model has.

    Raises:
        ModeclipError: There is no such model or index, an index is half built or of another model, or two have a name.
    """
    place = Path(expand_homes(str(what)))
    paths = RunPaths(folder=place)
    is_run = not (place / MANIFEST_FILE).is_file() and (paths.bundle.is_dir() or paths.catalog_path.is_dir())
    if is_run and not (paths.bundle / MANIFEST_FILE).is_file():
        raise ModeclipError(f"run {place}: {paths.bundle / MANIFEST_FILE} is missing; finish the run with modeclip run")
    named: dict[str, str] = {}
    for folder in (expand_homes(str(one)).rstrip("/") for one in indexes):
        last = folder.rpartition("/")[2]
        name = place.resolve().name if last == paths.index.name else last.removesuffix(".index")
        if name in named:
            raise ModeclipError(f"--index: {named[name]} and {folder} are both called {name!r}; rename a folder")
        named[name] = folder
    model = paths.bundle if is_run else what
    resolved = place.resolve() if is_run or place.exists() else place
    source = Source(
        name=resolved.parent.name if resolved.name == "bundle" else resolved.name,
        model=expand_homes(str(model)),
        run=paths.folder if is_run else None,
        is_bundle=(Path(split_expert(expand_homes(str(model)))[0]) / MANIFEST_FILE).is_file(),
        indexes=named,
        device=device,
        encoder=encoder,
        trust_encoder=trust_encoder,
        max_memory=max_memory,
    )
    if is_run and not named and paths.catalog_path.is_dir():
        built = {source.name: paths.index}
        _build_own(source, paths.catalog_path, paths.index)
        if paths.held_out_index.is_dir():
            built[paths.held_out_index.stem] = paths.held_out_index
            _build_own(source, paths.tasks_path, paths.held_out_index)
        source = replace(source, indexes={name: str(folder) for name, folder in built.items()})
    return Service(source, limits or Limits(), dimension=dimension)


def _build_own(source: Source, catalog: Path, folder: Path) -> None:
    """Build an index of a run's pairs if it is not there, was not finished, or is of what the bundle was before."""
    from modeclip.data.catalog import Catalog

    model = SearchModel.open(
        source.model, device=source.device, encoder=source.encoder, trust_encoder=source.trust_encoder
    )
    is_outdated = drop_outdated(folder, catalog, model)
    if not (folder / INDEX_FILE).is_file():
        why = f"{source.model} has changed" if is_outdated else "first start"
        log(f"{why}: encode the images of {catalog} into {folder}")
        Index.build(Catalog.open(catalog), model, folder)
