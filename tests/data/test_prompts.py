"""Class names come from a file or from a list with commas; mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeclip.data.prompts import read_classes
from modeclip.errors import ModeclipError


def test_classes_that_are_no_file_and_no_list() -> None:
    assert read_classes("cat, dog") == ["cat", "dog"]
    with pytest.raises(ModeclipError, match=r"classes nowhere\.txt: no such file"):
        read_classes("nowhere.txt")
    with pytest.raises(ModeclipError, match="there are no class names; give a file"):
        read_classes(" , ")


def test_class_names_from_file_or_list(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\n\n hot dog \n")
    assert read_classes(str(tmp_path / "classes.txt")) == ["cat", "hot dog"]
    assert read_classes("cat, hot dog,") == ["cat", "hot dog"]
    with pytest.raises(ModeclipError, match="there are no class names; give a file"):
        read_classes(" , ")


def test_class_names_that_are_a_path_or_too_many_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("cat\ncat\n", encoding="utf-8-sig")
    assert read_classes(str(tmp_path / "classes.txt")) == ["cat", "cat"]
    assert "more than one class is called 'cat'; nothing can tell them apart" in capsys.readouterr().err
    many = [f"class number {number}" for number in range(30)]
    assert read_classes(",".join(many)) == many
    assert read_classes("c" * 300) == ["c" * 300]
    for text, found in ((tmp_path, "a folder"), (tmp_path / "classes", "no such file"), ("classes.json", "no such")):
        with pytest.raises(ModeclipError, match=f"classes .*{found}.*give a file with one class name"):
            read_classes(str(text))
