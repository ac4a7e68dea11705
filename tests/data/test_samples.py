"""A sample knows where its image is."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeclip.data.samples import Sample


def test_an_image_is_read_from_memory_a_file_or_a_part_of_one(tmp_path: Path):
    path = tmp_path / "whole"
    path.write_bytes(b"0123456789")
    assert Sample("k", "c", image=b"abc").read() == b"abc"
    assert Sample("k", "c", path=str(path)).read() == b"0123456789"
    assert Sample("k", "c", path=str(path), offset=3, size=4).read() == b"3456"
    with pytest.raises(FileNotFoundError, match="names no image"):
        Sample("k", "c").read()
