"""Captions and images decode as they should, and every way in which they cannot has its cause."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeclip.data.images import cause_of, decode_image, measure_image
from modeclip.data.samples import (
    BOMB,
    EMPTY_CAPTION,
    MISSING,
    NO_CAPTION,
    NOT_JSON,
    NOT_UTF8,
    UNDECODABLE,
    UNREADABLE,
    CaptionRule,
    Sample,
    Skipped,
    samples_of,
)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint32) % 251
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))


@given(st.text())
def test_a_caption_is_the_text_without_the_space_around_it(text):
    expected = text.removeprefix("\ufeff").strip()
    captions = CaptionRule().read(text.encode("utf-8", "ignore"), "txt", "k")
    if expected.encode("utf-8", "ignore").decode():
        assert captions == [expected.encode("utf-8", "ignore").decode()]
    else:
        assert isinstance(captions, Skipped)
        assert captions.cause == EMPTY_CAPTION


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip))
def test_a_json_caption_is_its_field(text):
    assert CaptionRule().read(json.dumps({"caption": text}).encode(), "json", "k") == [text.strip()]


@pytest.mark.parametrize(
    ("data", "suffix", "cause"),
    [
        (b"", "txt", EMPTY_CAPTION),
        (b" \n", "txt", EMPTY_CAPTION),
        (b'{"caption": " "}', "json", EMPTY_CAPTION),
        (b'{"caption": [1, "", null, ["alt"]]}', "json", EMPTY_CAPTION),
        (b"[" * 100_000, "json", NOT_JSON),
        (b"caf\xe9", "txt", NOT_UTF8),
        (b'{"caption": "caf\xe9"}', "json", NOT_UTF8),
        (b"{", "json", NOT_JSON),
        (b"[1]", "json", NO_CAPTION),
        (b'{"caption": null}', "json", NO_CAPTION),
        (b"{}", "meta.json", NO_CAPTION),
    ],
)
def test_what_is_no_caption_has_a_cause(data, suffix, cause):
    skipped = CaptionRule().read(data, suffix, "the key")
    assert isinstance(skipped, Skipped)
    assert (skipped.key, skipped.cause) == ("the key", cause)
    assert suffix.rpartition(".")[2] in skipped.detail or cause == NOT_JSON


@pytest.mark.parametrize(
    ("content", "rule", "captions"),
    [
        ({"caption": ["one", " two ", "one", ""]}, CaptionRule(), ["one", "two"]),
        ({"alt": "one", "caption": "two"}, CaptionRule(field="alt"), ["one"]),
        ({"texts": [["alt", "one"], ["title", "two"], ["alt", "three"]]}, CaptionRule(), ["one", "two", "three"]),
        (
            {"texts": [["alt", "one"], ["title", "two"], ["alt", "three"]]},
            CaptionRule(text_keys=frozenset({"alt"})),
            ["one", "three"],
        ),
        ({"texts": [["alt", "one"]], "caption": "two"}, CaptionRule(), ["two"]),
    ],
)
def test_a_json_file_may_hold_several_captions(content, rule, captions):
    assert rule.read(json.dumps(content).encode(), "json", "k") == captions


def test_every_line_is_a_caption_where_that_is_asked_for():
    text = b"one cat\r\n\n two cats\none cat\n"
    assert CaptionRule(lines=True).read(text, "txt", "k") == ["one cat", "two cats"]
    assert CaptionRule().read(text, "txt", "k") == ["one cat\r\n\n two cats\none cat"]


def test_captions_of_one_image_are_samples_with_numbered_keys():
    samples = list(samples_of(["a", "b", "c"], "k", path="p", offset=3, size=4))
    assert [(s.key, s.caption) for s in samples] == [("k", "a"), ("k#1", "b"), ("k#2", "c")]
    assert {(s.path, s.offset, s.size) for s in samples} == {("p", 3, 4)}


def test_an_image_is_read_from_memory_a_file_or_a_part_of_one(tmp_path: Path):
    path = tmp_path / "whole"
    path.write_bytes(b"0123456789")
    assert Sample("k", "c", image=b"abc").read() == b"abc"
    assert Sample("k", "c", path=str(path)).read() == b"0123456789"
    assert Sample("k", "c", path=str(path), offset=3, size=4).read() == b"3456"
    with pytest.raises(FileNotFoundError, match="names no image"):
        Sample("k", "c").read()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_images_come_back_as_they_were(kind):
    data = encode(gradient(), kind, lossless=True)
    assert decode_image(data).tobytes() == gradient().tobytes()
    assert measure_image(data) == (40, 30)


def test_a_jpeg_is_measured_at_full_size_though_decoded_small():
    assert measure_image(encode(gradient(401, 299), "JPEG")) == (401, 299)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    drawing = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":  # a palette in which the first colour is transparent
        drawing = Image.new("P", (2, 1))
        drawing.putpalette([0, 0, 0, 0, 0, 0])
        drawing.putpixel((1, 0), 1)
        data = encode(drawing, transparency=b"\x00\xff")
    else:
        data = encode(drawing.convert(mode))
    pixels = decode_image(data)
    assert pixels.mode == "RGB"
    assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_sixteen_bits_keep_their_shades():
    shades = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = decode_image(encode(Image.fromarray(shades)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0x40, 0x80, 0xFF]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_found_without_keeping_its_pixels(kind, share):
    data = encode(gradient(200, 200), kind)
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
        lambda: measure_image(encode(gradient(11, 10))),  # over the limit: a warning, here an error
        lambda: measure_image(encode(gradient(40, 30))),  # over twice the limit
        lambda: measure_image(b"hello"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            fail()
        causes.append(cause_of(caught.value))
    assert causes == [MISSING, UNREADABLE, BOMB, BOMB, UNDECODABLE]
