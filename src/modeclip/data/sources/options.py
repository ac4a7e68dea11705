"""What a user says about the data: one config, with a group of options for each kind of source.

Users write the options without their groups: a recipe has ``data: {source: icons, train_sets: [lucide]}``, a command
``modeclip index SOURCE --image-column x``. ``DataConfig.from_flat`` and ``DataConfig.nested`` put flat names into their
groups, ``DataConfig.flat`` does the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from modeclip.data.images import EXIF, Exif
from modeclip.data.sources.captions import FileOptions
from modeclip.data.sources.iconify import IconifyOptions
from modeclip.data.sources.icons import IconOptions
from modeclip.data.sources.source import Options
from modeclip.data.sources.tables import TableOptions
from modeclip.errors import ModeclipError, unknown

HOLDOUT_UNITS = ("image", "similar", "group")
"""What ``holdout`` may name."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where image-caption pairs come from, and which of them are held out for evaluation."""

    source: Annotated[str, arg(metavar="SOURCE")]
    """`icons` (built in), `iconify` (200 sets from npm; or `iconify:FOLDER`), a folder of images with same-named .txt
    or .json files or with a sub-folder for each class, .csv, .tsv or .parquet files, a Hugging Face dataset on disk,
    tar shards, or what img2dataset wrote. Names expand braces (`data/{000..009}.tar`), `::` joins them, a folder means
    all files in it; all may be in an object store (`s3://bucket/folder/`)."""
    tables: OmitArgPrefixes[TableOptions] = field(default_factory=TableOptions)
    """Options of tables."""
    files: OmitArgPrefixes[FileOptions] = field(default_factory=FileOptions)
    """Options of folders and shards."""
    copy_images: Annotated[bool, arg(aliases=["--copy"])] = False
    """Copy the images into the catalog instead of referring to the files that hold them."""
    icons: OmitArgPrefixes[IconOptions] = field(default_factory=IconOptions)
    """Options of icon sets."""
    iconify: OmitArgPrefixes[IconifyOptions] = field(default_factory=IconifyOptions)
    """Further options of iconify's sets."""
    tasks: tuple[str, ...] = ()
    """Held out as zero-shot tasks. Icons: names of sets. Own data: folders that hold a sub-folder of images for each
    class, written FOLDER or NAME=FOLDER. Pairs whose image is in a task are left out of training and counted; of icon
    sets, the task is left without an image that is trained on."""
    check_images: bool = True
    """Decode every image once, so that damaged ones are left out and counted. Without it images in files are not
    opened: that saves the time to read them, but sizes are 0, hashes are missing and damage shows later. Where there
    are tasks images are read and hashed all the same, and with holdout_fraction decoded too."""
    exif: Exif = "apply"
    """Turn images upright as their EXIF data say (apply), or leave them as their pixels are stored (ignore), which is
    what open_clip and CLIP_benchmark do."""
    split: str = "train"
    """Folders: which split is read where sub-folders are called train, val, test and the like; `all` reads all."""
    holdout_fraction: float = 0.0
    """Share of the images, or of the groups, that is never trained on and becomes a task `holdout` (class = caption),
    beside ``tasks`` if there are any; in [0, 1)."""
    holdout: str = "image"
    """What is held out as a whole. `image`: all pairs whose image has the same bytes. `similar`: also near-duplicates,
    images whose 64-bit dHashes differ in at most 3 bits, and chains of them. `group=COLUMN`: all pairs with the same
    value in a column, such as a site or an artist (`group` alone: folder or shard); other pairs with an image of theirs
    are left out."""
    holdout_seed: int = 0
    """Which images or groups are drawn, 0 or more. With the same seed and fraction the same image always falls on the
    same side, whatever else the source holds."""
    max_skipped_fraction: float = 0.05
    """Stop with an error when more than this share of the pairs cannot be used; in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ModeclipError(f"data.source: expected a name, got {self.source!r}")
        if self.exif not in EXIF:
            raise unknown("data.exif", self.exif, EXIF)
        if not self.split.strip():
            raise ModeclipError(f"data.split: expected the name of a split, or all, got {self.split!r}")
        if not 0 <= self.holdout_fraction < 1:
            raise ModeclipError(f"data.holdout_fraction: expected a number in [0, 1), got {self.holdout_fraction}")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ModeclipError(
                f"data.max_skipped_fraction: expected a number in [0, 1], got {self.max_skipped_fraction}"
            )
        if not 0 <= self.holdout_seed < 2**63:
            raise ModeclipError(f"data.holdout_seed: expected 0 or more (below 2^63), got {self.holdout_seed}")
        parse_holdout(self.holdout, HOLDOUT_UNITS, "data.holdout")

    def options(self, group: type[Options]) -> Options:
        """Return the options of one group, such as ``TableOptions``."""
        return next(value for value in vars(self).values() if isinstance(value, group))

    def flat(self) -> dict[str, Any]:
        """Return all options by their flat names, as recipes and command lines have them.

        Those of `LATER` are left out where they have their defaults, so that runs and catalogs that were made before
        there were such options are still known by the same.
        """
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            found |= value if name in GROUPS else {name: value}
        return {name: value for name, value in found.items() if name not in LATER or LATER[name] != value}

    @classmethod
    def from_flat(cls, options: Mapping[str, Any]) -> DataConfig:
        """Return the config of options by their flat names.

        Raises:
            ModeclipError: A name is unknown or a value is out of range.
        """
        nested = cls.nested(options)
        return cls(**nested | {name: GROUPS[name](**nested[name]) for name in GROUPS if name in nested})

    @staticmethod
    def nested(options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options by their flat names as a dictionary in which each group is a dictionary of its own.

        Raises:
            ModeclipError: A name is unknown.
        """
        group_of = {each.name: name for name, group in GROUPS.items() for each in fields(group)}
        known = [*_DEFAULTS.flat(), *LATER]
        found: dict[str, Any] = {}
        for name, value in options.items():
            if name not in known:
                raise unknown("field", f"data.{name}", known)
            place = found.setdefault(group_of[name], {}) if name in group_of else found
            place[name] = value
        return found


LATER = {"exif": "apply", "split": "train", "holdout": "image", "holdout_seed": 0}
"""Options that earlier versions did not have, with their defaults."""


def parse_holdout(text: str, units: Sequence[str], field: str) -> tuple[str, str]:
    """Return the unit that a holdout names, and for ``group`` and ``group=NAME`` the column of the groups.

    Args:
        text: One of the units, or ``group=NAME``.
        units: Units that are known here.
        field: Name of the setting, for the message.

    Raises:
        ModeclipError: It names no unit.

    Examples:
        >>> parse_holdout("image", ["image", "group"], "holdout"), parse_holdout("group=site", ["group"], "holdout")
        (('image', ''), ('group', 'site'))
    """
    unit, equals, column = text.partition("=")
    if unit not in units or (equals and (unit != "group" or not column)):
        raise ModeclipError(f"{field}: expected {', '.join(units)} or group=COLUMN, got {text!r}")
    return unit, column or ("group" if unit == "group" else "")


_DEFAULTS = DataConfig(source="any")
GROUPS: dict[str, type[Any]] = {name: type(value) for name, value in vars(_DEFAULTS).items() if is_dataclass(value)}
"""The class of each group of options, by its field of ``DataConfig``."""
