"""Images decode as they should, and every way in which they cannot has its cause."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeclip.data.images import cause_of, decode_image, examine, examine_all, hash_image, map_in_order, measure_image
from modeclip.data.samples import BOMB, EMPTY, MISSING, SHORT_FILE, UNDECODABLE, UNREADABLE, Sample
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
        data = encode_picture(drawing, transparency=b"\x00\xff")
    else:
        data = encode_picture(drawing.convert(mode))
    pixels = decode_image(data)
    assert pixels.mode == "RGB"
    assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_sixteen_bits_keep_their_shades():
    shades = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = decode_image(encode_picture(Image.fromarray(shades)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0x40, 0x80, 0xFF]


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
