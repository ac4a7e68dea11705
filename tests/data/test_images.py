"""Images decode as they should, and every way in which they cannot has its cause."""

from __future__ import annotations

import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from modeclip.data.images import (
    as_stored,
    cause_of,
    decode_image,
    examine,
    examine_all,
    hash_image,
    map_in_order,
    measure_image,
    to_rgb,
)
from modeclip.data.samples import BOMB, EMPTY, MISSING, SHORT_FILE, UNDECODABLE, UNREADABLE, UNSCALABLE, Sample
from support import encode_picture


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint32) % 251
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_images_come_back_as_they_were(kind):
    data = encode_picture(gradient(), kind, lossless=True)
    assert decode_image(data).tobytes() == gradient().tobytes()
    assert measure_image(data) == (40, 30)


def test_a_jpeg_is_measured_at_full_size_though_decoded_small():
    assert measure_image(encode_picture(gradient(401, 299), "JPEG")) == (401, 299)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    drawing = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":  # a palette in which the first colour is transparent
        drawing = Image.new("P", (2, 1))
        drawing.putpalette([0, 0, 0, 0, 0, 0])
        drawing.putpixel((1, 0), 1)
        drawing.info["transparency"] = b"\x00\xff"
    else:
        drawing = drawing.convert(mode)
    for pixels in (decode_image(encode_picture(drawing)), to_rgb(drawing)):
        assert pixels.mode == "RGB"
        assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_sixteen_bits_keep_their_shades():
    shades = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = decode_image(encode_picture(Image.fromarray(shades)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0x40, 0x80, 0xFF]


# ---------------------------------------------------------------- greys of more than 8 bits

SHADES = np.array([[0, 300, 13107], [39321, 52428, 65535]], np.uint16)
SHADES_OF_8 = [[0, 1, 51], [153, 204, 255]]
"""The same greys of 8 bits: the value divided by 257."""


def pgm(values: np.ndarray, white: int, plain: bool = False) -> bytes:
    header = f"{'P2' if plain else 'P5'}\n{values.shape[1]} {values.shape[0]}\n{white}\n".encode()
    pixels = " ".join(map(str, values.ravel().tolist())).encode() if plain else values.astype(">u2").tobytes()
    return header + pixels


def tiff(values: np.ndarray, order: str = "<", photometric: int = 1) -> bytes:
    """Return a TIFF of one strip, written by hand; the type of the values tells the sample format."""
    values = values.astype(values.dtype.newbyteorder(order))
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, values.nbytes), (339, kind)]
    start = 8 + values.nbytes
    entries = b"".join(struct.pack(f"{order}HHLHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = struct.pack(f"{order}2sHL", b"II" if order == "<" else b"MM", 42, start)
    return head + values.tobytes() + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def greys(data: bytes) -> list[list[int]]:
    pixels = np.asarray(decode_image(data))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


@pytest.mark.parametrize(
    "data",
    [
        pgm(SHADES, 65535),
        pgm(SHADES, 65535, plain=True),
        encode_picture(Image.fromarray(SHADES)),
        tiff(SHADES),
        tiff(SHADES, ">"),
        tiff(65535 - SHADES, photometric=0),
        tiff(SHADES.astype(np.uint32)),
        tiff(SHADES.astype(np.int32)),
        tiff(SHADES.astype(np.int32), ">"),
        tiff(SHADES.astype(np.float32)),
        tiff((SHADES / 65535).astype(np.float32)),
        tiff((SHADES / 65535).astype(np.float32), ">"),
    ],
    ids=["P5", "P2", "PNG", "I;16", "I;16B", "white-is-zero", "u32", "i32", "i32B", "f32", "f32-to-1", "f32B-to-1"],
)
def test_the_same_greys_of_more_bits_are_the_same_picture(data):
    assert greys(data) == SHADES_OF_8
    assert measure_image(data) == (3, 2)


def test_white_is_the_greatest_value_of_the_format():
    assert greys(pgm(np.array([[0, 500, 1000]]), 1000)) == [[0, 128, 255]]
    assert greys(pgm(np.array([[0, 2047, 4095]]), 4095, plain=True)) == [[0, 127, 255]]
    dark = pgm(np.array([[300, 512]]), 65535)
    assert greys(dark) == [[1, 2]], "a dark picture stays dark"


def test_values_of_8_bits_in_more_stay_what_they_are():
    eight = np.array([[0, 100, 200]])
    assert greys(tiff(eight.astype(np.int32))) == greys(tiff(eight.astype(np.float32))) == [[0, 100, 200]]


def test_values_that_state_no_range_go_from_the_least_to_the_greatest():
    assert greys(tiff(np.array([[-1000, 0, 1000]], np.int16))) == [[0, 128, 255]]
    assert greys(tiff(np.array([[0, 2**30, 2**31 - 1]], np.int32))) == [[0, 128, 255]]
    assert greys(tiff(np.array([[0, 2**31, 2**32 - 1]], np.uint32))) == [[0, 128, 255]]
    assert greys(tiff(np.array([[-3e38, 0, 3e38]], np.float32))) == [[0, 128, 255]]
    assert greys(tiff(np.array([[0.5, 1.0, 1.5]], np.float32))) == [[0, 128, 255]]
    assert greys(tiff(np.array([[np.nan, -np.inf, 0.0, 1.0, np.inf]], np.float32))) == [[0, 0, 0, 255, 255]]
    assert greys(tiff(np.full((1, 2), 10**6, np.int32))) == [[0, 0]], "one value says nothing"


def test_an_image_without_a_finite_value_has_a_cause():
    data = tiff(np.full((2, 2), np.nan, np.float32))
    assert examine(Sample("x", "", image=data)).cause == UNSCALABLE


def test_a_grey_that_stands_for_transparency_becomes_white():
    assert greys(encode_picture(Image.fromarray(SHADES), transparency=300))[0] == [0, 255, 51]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_8_bits_is_what_pillow_makes_of_it(mode):
    picture = gradient().convert(mode)
    data = encode_picture(picture, {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG"))
    assert decode_image(data).tobytes() == picture.convert("RGB").tobytes()


# ---------------------------------------------------------------- orientation

CORNERS = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}
"""Where the stored corners (upper left, upper right, lower left, lower right) are to be seen, by the tables of EXIF."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation, kind):
    colours = dict(zip("abcd", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], strict=True))
    stored = Image.new("RGB", (64, 32))
    for at, corner in enumerate("abcd"):
        stored.paste(colours[corner], (32 * (at % 2), 16 * (at // 2), 32 * (at % 2) + 32, 16 * (at // 2) + 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode_picture(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    picture = decode_image(data)
    size = (64, 32) if orientation < 5 else (32, 64)
    assert picture.size == measure_image(data) == size
    width, height = size
    places = [(width // 4 + width // 2 * x, height // 4 + height // 2 * y) for y in (0, 1) for x in (0, 1)]
    seen = [np.array(picture.getpixel(place)) for place in places]
    assert (
        "".join(min("abcd", key=lambda c, s=s: abs(s - np.array(colours[c])).sum()) for s in seen)
        == (CORNERS[orientation])
    )
    if kind != "TIFF":  # Pillow turns these by itself
        assert decode_image(data, "ignore").size == measure_image(data, "ignore") == (64, 32)
        assert decode_image(as_stored(data)).tobytes() == decode_image(data, "ignore").tobytes()


def test_what_states_no_orientation_is_returned_as_it_is():
    data = encode_picture(gradient(), "JPEG")
    assert as_stored(data) is data


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0garbage" * 9, b"\xff" * 40])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_leave_an_image_as_it_is(exif, kind):
    data = encode_picture(gradient(), kind, exif=exif)
    assert decode_image(data).tobytes() == decode_image(data, "ignore").tobytes()
    assert examine(Sample("x", "", image=data)).cause == ""


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert decode_image(encode_picture(gradient(), exif=exif)).tobytes() == gradient().tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_found_without_keeping_its_pixels(kind, share):
    data = encode_picture(gradient(200, 200), kind)
    for function in (measure_image, decode_image):
        with pytest.raises(Exception) as caught:  # noqa: PT011 (each decoder has its own)
            function(data[: int(len(data) * share)])
        assert cause_of(caught.value) == UNDECODABLE


@given(st.binary(max_size=200))
def test_bytes_at_random_raise_what_has_a_cause(data):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        measure_image(data)
    assert cause_of(caught.value) == UNDECODABLE


def test_each_failure_has_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    causes = []
    for fail in (
        lambda: Sample("k", "c", path=str(tmp_path / "none.png")).read(),
        lambda: Sample("k", "c", path=str(tmp_path)).read(),
        lambda: measure_image(encode_picture(gradient(11, 10))),  # over the limit: a warning, here an error
        lambda: measure_image(encode_picture(gradient(40, 30))),  # over twice the limit
        lambda: measure_image(b"hello"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            fail()
        causes.append(cause_of(caught.value))
    assert causes == [MISSING, UNREADABLE, BOMB, BOMB, UNDECODABLE]


def test_examining_says_what_an_image_is_or_why_it_is_none(tmp_path: Path):
    data = encode_picture(gradient())
    path = tmp_path / "image.png"
    path.write_bytes(data)
    seen = examine(Sample("k", "c", path=str(path)))
    assert (seen.cause, seen.width, seen.height, seen.digest, seen.image) == ("", 40, 30, hash_image(data), None)
    assert examine(Sample("k", "c", path=str(path)), keep=True).image == data
    assert examine(Sample("k", "c", image=data)).image == data
    causes = {
        EMPTY: Sample("k", "c", image=b""),
        UNDECODABLE: Sample("k", "c", image=data[:50]),
        MISSING: Sample("k", "c", path=str(tmp_path / "none.png")),
        SHORT_FILE: Sample("k", "c", path=str(path), offset=10, size=len(data)),
    }
    samples = list(causes.values())
    assert [seen.cause for seen in examine_all([samples[:1], [], samples[1:]], 2)] == list(causes)


def test_results_keep_the_order_of_their_items_and_few_are_under_way():
    taken: list[int] = []

    def items():
        for item in range(1, 41):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item

    with ThreadPoolExecutor(4) as pool:
        for done, result in enumerate(map_in_order(pool, work, items(), 6), 1):
            assert result == done
            assert len(taken) <= done + 6
