"""The options of all kinds of sources are flat for users and grouped by kind for modeclip."""

from __future__ import annotations

import json
from dataclasses import fields
from hashlib import sha256

import pytest

from modeclip.data.sources.captions import FileOptions
from modeclip.data.sources.options import GROUPS, LATER, DataConfig
from modeclip.data.sources.tables import TableOptions
from modeclip.errors import ModeclipError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_keys": " ; "}, r"data\.image_keys.*such as 'a;b', got ' ; '"),
        ({"caption_keys": ""}, r"data\.caption_keys: expected suffixes"),
        ({"holdout_fraction": 1.0}, r"data\.holdout_fraction.*\[0, 1\), got 1\.0"),
        ({"max_skipped_fraction": 1.5}, r"data\.max_skipped_fraction.*\[0, 1\], got 1\.5"),
        ({"image_size": 0}, r"data\.image_size: expected 1 to 4,096, got 0"),
        ({"separator": "tab"}, r"data\.separator.*one character.*got 'tab'"),
        ({"workers": 0}, r"data\.workers: expected 1 to 4,096, got 0"),
        ({"class_template": "a photo"}, r"data\.class_template.*\{\}.*got 'a photo'"),
        ({"caption_field": " "}, r"data\.caption_field: expected a name, got ' '"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ModeclipError, match=message):
        DataConfig.from_flat({"source": "icons", **options})


def test_flat_options_find_their_groups_and_come_back():
    flat = {"source": "x", "image_column": "picture", "aliases": True, "class_template": "a {}", "tasks": ("a",)}
    config = DataConfig.from_flat(flat)
    assert (config.tables.image_column, config.iconify.aliases, config.files.class_template) == (
        "picture",
        True,
        "a {}",
    )
    assert config.options(TableOptions) is config.tables
    assert config.options(FileOptions) is config.files
    assert config.flat() == DataConfig(source="x").flat() | flat
    assert DataConfig.from_flat(config.flat()) == config
    with pytest.raises(ModeclipError, match=r"field 'data\.sauce'.*known: source, image_column"):
        DataConfig.from_flat({"source": "x", "sauce": 1})


def test_no_option_has_the_name_of_another_and_no_group_is_large():
    names = [each.name for each in fields(DataConfig) if each.name not in GROUPS]
    groups = [[each.name for each in fields(group)] for group in GROUPS.values()]
    assert max(map(len, (names, *groups))) <= 12
    every = [*names, *(name for group in groups for name in group)]
    assert len(set(every)) == len(every) == len(DataConfig(source="x").flat()) + len(LATER)


def test_the_flat_options_of_a_run_keep_their_digest():
    """Run folders and catalogs of earlier versions know their data by these names, defaults and this order."""
    flat = json.dumps(DataConfig.from_flat({"source": "icons", "train_sets": ("lucide",)}).flat())
    assert sha256(flat.encode()).hexdigest()[:16] == "c9330f4df744d19d"
