"""Makes a noisy copy of a catalog: real noise of the web in known shares, and for each pair what was done to it.

    python runs/noise.py icons/catalog.lance noisy --shuffled 0.1 --common 0.05 --seed 0

Names of icons are cleaner than captions of the web. So that curation can be judged, a share of the pairs of the copy
has noise of a known kind, in the catalog's column ``noise``:

    shuffled     the caption of another pair
    common       one caption that says nothing, the same for all
    file name    the name of a file for a caption
    odd          a tiny image, or one that is far longer than wide
    same, rescaled, recoded, shifted, recoloured
                 a further pair: the image of a clean one in these ways, half of them with other words for the caption
    clean        nothing

The column ``origin`` has the key of the pair that each was made of. Which pairs get which noise is drawn from the seed
and from keys and captions alone, so it does not depend on the order of the catalog, nor on pairs that come later.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from modeclip.curation.method import draw
from modeclip.data.catalog import Catalog
from modeclip.data.images import decode_image
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig

CLEAN = "clean"
SHARES = {"shuffled": 0.1, "common": 0.05, "file name": 0.05, "odd": 0.05, "copies": 0.1}
"""Default shares of the pairs; ``copies`` are further pairs, a fifth of them of each kind."""
COMMON = "click to see the full size image"
FILE_NAMES = (
    "IMG_{:04d}.jpg",
    "DSC{:05d}.JPG",
    "Screenshot 2021-03-{:02d} at 10.22.{:02d}.png",
    "image ({}).png",
    "{:x}.jpeg",
)
REWORDED = ("icon of {}", "{} symbol", "a drawing: {}", "{} (free download)")
ROWS_AT_ONCE = 1024

Change = Callable[[Image.Image, np.random.Generator], bytes]


def encode(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    """Return the bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rescale(image: Image.Image, random: np.random.Generator) -> bytes:
    """Scale an image by 0.5 to 2."""
    factor = 2 ** random.uniform(-1, 1)
    size = (max(1, round(factor * image.width)), max(1, round(factor * image.height)))
    return encode(image.resize(size, Image.Resampling.BICUBIC))


def recode(image: Image.Image, random: np.random.Generator) -> bytes:
    """Write an image as JPEG of quality 30 to 90."""
    return encode(image, "JPEG", quality=int(random.integers(30, 91)))


def shift(image: Image.Image, random: np.random.Generator) -> bytes:
    """Move an image by up to a tenth of its side, on white."""
    moved = Image.new("RGB", image.size, "white")
    x, y = (int(random.integers(1, max(2, side // 10 + 1))) * int(random.choice([-1, 1])) for side in image.size)
    moved.paste(image, (x, y))
    return encode(moved)


def recolour(image: Image.Image, random: np.random.Generator) -> bytes:
    """Paint the dark of an image in a random colour."""
    colour = tuple(int(value) for value in random.integers(0, 160, 3))
    return encode(ImageOps.colorize(image.convert("L"), colour, "white"))


def make_odd(image: Image.Image, random: np.random.Generator) -> bytes:
    """Make an image tiny, or four to eight times as long as it is wide."""
    if random.random() < 0.5:
        side = int(random.integers(3, 9))
        return encode(image.resize((side, side)))
    longer = round(image.width * random.uniform(4, 8))
    size = (longer, image.height) if random.random() < 0.5 else (image.width, longer)
    return encode(image.resize(size))


COPIES: dict[str, Change | None] = {
    "same": None,
    "rescaled": rescale,
    "recoded": recode,
    "shifted": shift,
    "recoloured": recolour,
}
"""What is done to the image of a copy; None: nothing."""


def choose(keys: list[str], captions: list[str], shares: dict[str, float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pair the kind of its noise, and the kind of its further copy, "" for none."""
    kinds = [name for name in shares if name != "copies"]
    ends = np.cumsum([shares[name] for name in kinds])
    if ends[-1] > 1:
        raise SystemExit(f"shares of noise add up to {ends[-1]:g}, expected at most 1")
    place = np.searchsorted(ends, draw(seed, ["noise"] * len(keys), keys, captions), side="right")
    noise = np.array([*kinds, CLEAN], object)[place]
    drawn = draw(seed, ["copies"] * len(keys), keys, captions) * (1 - ends[-1]) / max(shares["copies"], 1e-9)
    copies = np.array([*COPIES, ""], object)[np.minimum(drawn * len(COPIES), len(COPIES)).astype(int)]
    copies[noise != CLEAN] = ""
    return noise, copies


def new_captions(keys: list[str], captions: list[str], noise: np.ndarray, seed: int) -> tuple[list[str], np.ndarray]:
    """Return the captions with their noise, and the noise: a pair that drew its own words again is clean."""
    changed, noise = list(captions), noise.copy()
    shuffled = np.flatnonzero(noise == "shuffled")
    drawn = draw(seed, ["order"] * len(shuffled), [keys[row] for row in shuffled.tolist()])
    circle = shuffled[np.argsort(drawn, kind="stable")]
    for row, other in zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True):
        changed[row] = captions[other]
        if captions[row] == captions[other]:
            noise[row] = CLEAN
    for row in np.flatnonzero(noise == "common").tolist():
        changed[row] = COMMON
    for row in np.flatnonzero(noise == "file name").tolist():
        numbers = generator(seed, keys[row]).integers(1, 10_000, 3)
        name = FILE_NAMES[numbers[0] % len(FILE_NAMES)]
        few = numbers[1:] % 28 + 1 if name.startswith("Screenshot") else numbers[1:]
        changed[row] = name.format(*few.tolist())
    return changed, noise


def generator(seed: int, key: str) -> np.random.Generator:
    """Return random numbers for one pair."""
    return np.random.default_rng(int(draw(seed, ["pair"], [key])[0] * 2**53))


def make_noisy(catalog: Catalog, out: Path, shares: dict[str, float], seed: int) -> Counter[str]:
    """Write the noisy copy of a catalog as Parquet, and return how many pairs have which noise."""
    pairs = catalog.read(["key", "caption"])
    keys, captions = pairs["key"].tolist(), [caption or "" for caption in pairs["caption"]]
    noise, copies = choose(keys, captions, shares, seed)
    changed, noise = new_captions(keys, captions, noise, seed)
    schema = pa.schema([("image", pa.binary()), *((name, pa.string()) for name in ("caption", "noise", "origin"))])
    out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with pq.ParquetWriter(out, schema) as writer:
        for start in range(0, len(keys), ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(keys)))
            table = []
            for row, data in zip(rows.tolist(), catalog.encoded_images(rows), strict=True):
                random = generator(seed, keys[row])
                image = make_odd(decode_image(data), random) if noise[row] == "odd" else data
                table.append((image, changed[row], noise[row], keys[row]))
                if copies[row]:
                    change = COPIES[copies[row]]
                    image = data if change is None else change(decode_image(data), random)
                    words = REWORDED[int(random.integers(len(REWORDED)))] if random.random() < 0.5 else "{}"
                    table.append((image, words.format(captions[row]), copies[row], keys[row]))
            counts.update(row[2] for row in table)
            writer.write_table(
                pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in table], schema)
            )
    return counts


def main() -> None:
    """Make the noisy catalog."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", help="the clean catalog")
    parser.add_argument("out", type=Path, help="folder of the noisy one; pairs.parquet is written into it too")
    for name, share in SHARES.items():
        parser.add_argument(f"--{name.replace(' ', '-')}", type=float, default=share, help=f"share; default {share}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shares = {name: getattr(arguments, name.replace(" ", "_")) for name in SHARES}
    counts = make_noisy(Catalog.open(arguments.catalog), arguments.out / "pairs.parquet", shares, arguments.seed)
    index(DataConfig.from_flat({"source": str(arguments.out / "pairs.parquet")}), arguments.out)
    for name, count in counts.most_common():
        print(f"{name:<12}{count:>10,}")


if __name__ == "__main__":
    main()
