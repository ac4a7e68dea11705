"""Everything that modeclip does with encoded images: decode, measure, hash and examine them.

Images become RGB on a white ground, upright as their EXIF data say. open_clip drops transparency instead, which turns a
black drawing on a transparent ground all black; it also lets Pillow clip 16-bit images to nearly all white.

Greys of more than 8 bits are scaled to 0 to 255. Where the format says what white is (65,535 in PNG and PGM, 2^bits - 1
in TIFF), that is white. Signed and 32-bit integers and floats say nothing: what lies in 0 to 255 or in 0 to 65,535, or
for floats in 0 to 1, is taken as such, anything else from its least to its greatest value. NaN is black.

Pillow's decoders raise nearly any exception on damaged bytes. ``cause_of`` turns an exception into the cause under
which the image is counted, and ``examine`` never raises.

Price: decoding dominates; threads share it, because Pillow releases the interpreter's lock.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
from jaxtyping import Float, Shaped
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from modeclip.data.samples import (
    BOMB,
    CHANGED,
    EMPTY,
    MISSING,
    SHORT_FILE,
    UNDECODABLE,
    UNREADABLE,
    UNSCALABLE,
    Sample,
)
from modeclip.errors import ModeclipError
from modeclip.system.console import progress

HASHES_PER_TASK = 256
"""Images that a thread hashes before it reports them to the progress bar."""
MANY_IMAGES = 4096
"""From this number of images on, hashing shows a progress bar."""

T = TypeVar("T")
R = TypeVar("R")


Exif = Literal["apply", "ignore"]
"""Whether images are turned upright as their EXIF data say."""
EXIF: tuple[Exif, ...] = get_args(Exif)
IGNORED = b"exif ignore"
"""What begins the hash of a set of images that are not turned upright, unlike others with the same bytes."""
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF."""


class UnscalableError(Exception):
    """The values of an image have no range that could be scaled to greys."""


class ChangedError(Exception):
    """The bytes of an image differ from those that were indexed."""


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow raise on a decompression bomb and keep silent about metadata that it cannot read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_image(data: bytes, exif: Exif = "apply") -> Image.Image:
    """Decode an encoded image to RGB; transparent parts become white.

    Args:
        data: The encoded image.
        exif: Whether to turn it upright as its EXIF data say; with "ignore" it is as Pillow opens it.

    Raises:
        Exception: The bytes cannot be decoded; ``cause_of`` names the cause.
    """
    image = Image.open(io.BytesIO(data))
    rgb = to_rgb(image)
    turn = _turn_of(image) if exif == "apply" else None
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture in RGB on a white ground; greys of more than 8 bits are scaled.

    Raises:
        UnscalableError: It has greys of more than 8 bits and no finite value.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_grey(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def open_picture(path: Path) -> Image.Image:
    """Decode a picture file.

    Raises:
        ModeclipError: There is no such file, or no image in it.
    """
    try:
        return decode_image(path.read_bytes())
    except FileNotFoundError:
        raise ModeclipError(f"picture {path}: no such file; correct the path") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise ModeclipError(f"picture {path}: {cause_of(error)}; give another image file") from None


def measure_image(data: bytes, exif: Exif = "apply") -> tuple[int, int]:
    """Return (width, height) in pixels of an image after decoding it to its last byte.

    Raises:
        Exception: As for ``decode_image``.
    """
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    image.draft("RGB", (1, 1))  # a JPEG is still read to its end, but decoded at an eighth of its size
    to_rgb(image)
    if exif == "apply" and _turn_of(image) in _SIDEWAYS:
        return height, width
    return width, height


def as_stored(data: bytes) -> bytes:
    """Return an encoded image that every decoder shows as its pixels are stored, whatever its EXIF data say."""
    if _EXIF_WORDS.search(data) is None:
        return data
    try:
        image = Image.open(io.BytesIO(data))
        image.load()  # a PNG may say it behind its pixels
        if _turn_of(image) is None:
            return data
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    except Exception:  # whoever decodes it has the same, and says so
        return data


# ---------------------------------------------------------------- EXIF orientation

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image of each EXIF orientation is turned upright; Pillow's rotations go against the clock."""
_SIDEWAYS = (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])
_ORIENTATION = ExifTags.Base.Orientation
_EXIF_WORDS = re.compile(rb"exif|orientation", re.IGNORECASE)
"""What an image that states an orientation has somewhere in its bytes."""
_EXIF_DATA = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})


def _may_be_turned(image: Image.Image) -> bool:
    """Say whether a loaded image has data that may state an orientation; only then they are parsed."""
    return not _EXIF_DATA.isdisjoint(image.info)


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return how a loaded image is turned upright; None if it is, or says nothing that can be understood."""
    if not _may_be_turned(image):
        return None
    try:
        return _TURNS.get(int(image.getexif().get(_ORIENTATION, 1)))
    except Exception:  # broken EXIF data raise nearly anything, and the pixels are whole
        return None


# ---------------------------------------------------------------- greys of more than 8 bits


def _to_grey(image: Image.Image) -> Image.Image:
    """Scale an image of 16-bit or 32-bit greys to 8 bits.

    Raises:
        UnscalableError: It has no finite value.
    """
    image.load()
    pixels, white = np.asarray(image), 65535 if image.mode.startswith("I;16") or image.format == "PPM" else 0
    inverted = False
    if isinstance(image, TiffImageFile):
        bits, kind = (image.tag_v2.get(tag, (1,))[0] for tag in (_BITS, _SAMPLE_FORMAT))
        inverted = image.tag_v2.get(_PHOTOMETRIC) == 0  # Pillow inverts these only where they have 8 bits
        white = 2**bits - 1 if kind == 1 and bits <= 16 else 0
        pixels = pixels.view(np.uint32) if kind == 1 and bits == 32 else pixels
    if white and pixels.dtype.kind != "f":
        scaled = (np.clip(pixels, 0, white).astype(np.uint32) * 255 + white // 2) // white
    else:
        scaled = _scale(pixels)
    grey = scaled.astype(np.uint8)
    if inverted:
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey = np.where(pixels == clear, np.uint8(255), grey)
    return Image.fromarray(grey)


def _scale(pixels: Shaped[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Scale values whose range nothing states to 0 to 255."""
    finite = pixels[np.isfinite(pixels)].astype(np.float64)
    if not finite.size:
        raise UnscalableError("no grey value is finite")
    low, high = float(finite.min()), float(finite.max())
    are_whole = pixels.dtype.kind != "f" or not np.mod(finite, 1).any()
    for white, fits in ((1, pixels.dtype.kind == "f"), (255, are_whole), (65535, are_whole)):
        if fits and 0 <= low <= high <= white:
            low, high = 0.0, float(white)
            break
    scaled = (pixels.astype(np.float64) - low) * (255 / ((high - low) or 1))
    filled: np.ndarray = np.rint(np.nan_to_num(scaled, nan=0, posinf=255, neginf=0)).clip(0, 255)
    return filled


# ---------------------------------------------------------------- causes


def cause_of(error: Exception) -> str:
    """Return the cause under which an exception from reading or decoding an image is counted."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MISSING
    if isinstance(error, ChangedError):
        return CHANGED
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BOMB
    if isinstance(error, UnscalableError):
        return UNSCALABLE
    if isinstance(error, ModeclipError) or (isinstance(error, OSError) and error.errno is not None):
        return UNREADABLE
    return UNDECODABLE


# ---------------------------------------------------------------- hashes


def hash_image(data: bytes) -> bytes:
    """Return the 16-byte hash of an encoded image, as the catalog's column ``digest`` holds it."""
    return blake2b(data, digest_size=16).digest()


def hash_parts(name: str, count: int, hash_some: Callable[[range], list[bytes]]) -> list[bytes]:
    """Hash images in threads, with a progress bar where there are many.

    Args:
        name: What the images belong to, for the progress bar.
        count: Number of images.
        hash_some: Returns the hashes of a range of images.
    """
    parts = [range(start, min(start + HASHES_PER_TASK, count)) for start in range(0, count, HASHES_PER_TASK)]
    found: list[bytes] = []
    bar = progress(f"hash {name}", count, "images") if count >= MANY_IMAGES else nullcontext()
    with bar as advance, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part in pool.map(hash_some, parts):
            found += part
            if advance is not None:
                advance(len(part))
    return found


# ---------------------------------------------------------------- examining


@dataclass(frozen=True, slots=True)
class Examined:
    """A sample, with what reading and decoding its image has shown."""

    sample: Sample
    cause: str = ""
    """Why the image cannot be used; empty if it can."""
    detail: str = ""
    """What a person would want to know beside the cause."""
    width: int = 0
    """Width in pixels; 0 if the image was not decoded."""
    height: int = 0
    """Height in pixels; 0 if the image was not decoded."""
    digest: bytes | None = None
    """Hash of the encoded image, if it was read."""
    image: bytes | None = None
    """The encoded image, if it is to be kept."""


def examine(sample: Sample, keep: bool = False, exif: Exif = "apply", *, decode: bool = True) -> Examined:
    """Read an image and decode it to its last byte; a failure is a cause, never an exception.

    Args:
        sample: Names the image.
        keep: Keep the encoded image even where the sample refers to a file.
        exif: Whether width and height are those of the image turned upright.
        decode: Without it the image is only read and hashed, and its size stays unknown.
    """
    try:
        data = sample.read()
        if sample.path is not None and len(data) < sample.size:
            return Examined(sample, SHORT_FILE, f"{len(data)} of {sample.size} bytes")
        if not data:
            return Examined(sample, EMPTY)
        width, height = measure_image(data, exif) if decode else (0, 0)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        return Examined(sample, cause_of(error), re.sub(r" ?<_io[^>]*>", "", str(error)))
    return Examined(sample, "", "", width, height, hash_image(data), data if keep or sample.path is None else None)


def examine_all(blocks: Iterable[Sequence[Sample]], threads: int, exif: Exif = "apply") -> Iterator[Examined]:
    """Read and decode the images of blocks of samples in threads, and yield what ``examine`` returns in their order."""

    def examine_block(block: Sequence[Sample]) -> list[Examined]:
        return [examine(sample, exif=exif) for sample in block]

    with ThreadPoolExecutor(threads) as pool:
        for examined in map_in_order(pool, examine_block, blocks, threads):
            yield from examined


def map_in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], num_ahead: int) -> Iterator[R]:
    """Yield the results of some work in the order of its items, with a bounded number of them under way.

    Args:
        pool: Threads or processes that do the work.
        work: What to do with each item.
        items: Consumed only as fast as the results are.
        num_ahead: Most items that are handed in before the first result is waited for.
    """
    under_way: deque[Future[R]] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > num_ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
