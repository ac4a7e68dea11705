"""Curating: decisions become columns; the same call does nothing again; nothing is half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.data.test_mapping import METADATA, ROWS, rows_of, write_catalog

from modeclip.curation.curating import Curated, curate, curations_of
from modeclip.curation.method import Context, Prepared, draw
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import Statistic, Work, map_fragments
from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError


@dataclass(frozen=True, kw_only=True)
class Shortest:
    """Keeps captions that are not longer than the mean of the pool, of these a share by lot."""

    method: ClassVar[str] = "shortest"
    share: float = 1.0
    seed: int = 0
    captions: bool = True

    def prepare(self, context: Context) -> Prepared:
        found = map_fragments(context.catalog, Lengths(), "count", selected=context.selected).total()
        mean = float(found["sum"][0] / found["count"][0])
        facts = asdict(self) | {"mean": mean}
        return Prepared(work=Shorter(context.name, mean, self.share, self.seed, facts), causes=("long", "drawn out"))


class Lengths(Statistic):
    inputs = ("caption",)
    unit = "captions"
    facts: ClassVar[dict[str, Any]] = {"statistic": "lengths"}

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        lengths = np.array([len(caption) for caption in block["caption"]], np.int64)
        return {"sum": np.array([lengths.sum()]), "count": np.array([len(lengths)])}

    def merge(self, parts: Any) -> dict[str, np.ndarray]:
        return {name: sum(part[name] for part in parts) for name in ("sum", "count")}


@dataclass
class Shorter(Work):
    name: str
    mean: float
    share: float
    seed: int
    facts: dict[str, Any]
    inputs = ("key", "caption")
    unit = "captions"

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        names = ("cause", "score", "caption") if self.facts["captions"] else ("cause", "score")
        return tuple(f"{self.name}_{what}" for what in names)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        lengths = np.array([len(caption) for caption in block["caption"]], np.float32)
        drawn_out = draw(self.seed, block["key"].tolist()) >= self.share
        cause = np.where(lengths > self.mean, 1, np.where(drawn_out, 2, 0)).astype(np.uint8)
        captions = np.array([caption.upper() for caption in block["caption"]], object)
        found = {f"{self.name}_cause": cause, f"{self.name}_score": lengths, f"{self.name}_caption": captions}
        return {name: found[name] for name in self.outputs}


def captions_of(count: int) -> list[str]:
    return ["x" * (1 + number * 7 % 13) for number in range(count)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return write_catalog(tmp_path / "c.lance", captions_of(ROWS))


def causes(curated: Curated) -> list[int]:
    return [int(cause) for cause in curated.column("cause")]


def expected_causes(captions: list[str], rows: list[int]) -> list[int]:
    mean = sum(len(captions[row]) for row in rows) / len(rows)
    return [(1 if len(caption) > mean else 0) if row in rows else 255 for row, caption in enumerate(captions)]


def test_decisions_become_columns_once(catalog: Catalog) -> None:
    captions = captions_of(ROWS)
    curated = curate(catalog, Shortest())
    assert causes(curated) == expected_causes(captions, list(range(ROWS)))
    assert curated.num_computed == ROWS
    assert curated.causes == {0: "kept", 1: "long", 2: "drawn out", 255: "not in the selection"}
    assert curated.added == ("kept", "cause", "score", "caption")
    assert curations_of(catalog) == ["shortest"]
    kept = catalog.select(mask="shortest_kept")
    assert kept.tolist() == [row for row, cause in enumerate(causes(curated)) if cause == 0]
    again = curate(Catalog.open(catalog.path), Shortest())
    assert again.num_computed == 0
    assert causes(again) == causes(curated)


def test_columns_of_earlier_settings_do_not_stay(catalog: Catalog) -> None:
    curate(catalog, Shortest(), name="a")
    curate(catalog, Shortest(), name="a_b")
    curate(catalog, Shortest(captions=False), name="a")
    columns = {name for name in Catalog.open(catalog.path).columns if name.startswith("a_")}
    assert columns == {"a_kept", "a_cause", "a_score", "a_b_kept", "a_b_cause", "a_b_score", "a_b_caption"}


def test_a_dry_run_decides_the_same_and_writes_no_column(catalog: Catalog) -> None:
    before = catalog.dataset.version
    dry = curate(catalog, Shortest(share=0.5), dry_run=True)
    assert Catalog.open(catalog.path).dataset.version == before
    wet = curate(catalog, Shortest(share=0.5))
    assert causes(dry) == causes(wet)
    assert 2 in causes(wet)
    assert (dry.column("score") == wet.column("score")).all()


def test_rows_outside_of_the_selection_are_neither_counted_nor_decided_about(catalog: Catalog) -> None:
    captions = captions_of(ROWS)
    curate(catalog, Shortest(), name="first")
    kept = catalog.select(mask="first_kept").tolist()
    second = curate(catalog, Shortest(), name="second", selection=Selection(mask="first_kept"))
    assert causes(second) == expected_causes(captions, kept)
    outside = np.setdiff1d(np.arange(ROWS), kept)
    assert np.isnan(np.asarray(second.column("score"), float)[outside]).all()
    assert all(second.column("caption")[row] is None for row in outside)
    assert set(catalog.select(mask="second_kept").tolist()) < set(kept)


def test_a_mask_that_was_replaced_decides_anew(tmp_path: Path) -> None:
    captions, mask = ["x"] * ROWS, np.arange(ROWS) % 2 == 0  # whose mean length is the same in both halves
    catalog = write_catalog(tmp_path / "c.lance", captions)
    for some in (mask, ~mask):
        catalog = Catalog.open(catalog.path)
        catalog.add_columns({"good": some})
        curated = curate(Catalog.open(catalog.path), Shortest(), selection=Selection(mask="good"))
        assert causes(curated) == expected_causes(captions, np.flatnonzero(some).tolist())
        assert curated.num_computed == ROWS
    assert curate(Catalog.open(catalog.path), Shortest(), selection=Selection(mask="good")).num_computed == 0


def test_pairs_that_are_added_are_counted_alone_and_decide_anew(catalog: Catalog, tmp_path: Path) -> None:
    from modeclip.data.storage import FileWriter, append

    curate(catalog, Shortest())
    writer = FileWriter(catalog.path, rows_of(0, 1).schema)
    writer.write(rows_of(ROWS, 8, captions=["y" * 40] * 8))
    append(catalog.path, writer.finish(), METADATA)
    grown = curate(Catalog.open(catalog.path), Shortest())
    whole = write_catalog(tmp_path / "whole.lance", captions_of(ROWS))
    writer = FileWriter(whole.path, rows_of(0, 1).schema)
    writer.write(rows_of(ROWS, 8, captions=["y" * 40] * 8))
    append(whole.path, writer.finish(), METADATA)
    assert causes(grown) == causes(curate(Catalog.open(whole.path), Shortest()))
    assert grown.num_computed == ROWS + 8


def test_a_selection_that_keeps_nothing_leaves_nothing(catalog: Catalog) -> None:
    before = catalog.dataset.version
    with pytest.raises(ModeclipError, match=r"keep none of 60 pairs \(\d+ long; \d+ drawn out\).*milder"):
        curate(catalog, Shortest(share=0.0))
    assert Catalog.open(catalog.path).dataset.version == before


@pytest.mark.parametrize("name", ["", "Upper", "1st", "a b", "x" * 50, "a/b"])
def test_a_name_that_no_column_can_have_is_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(ModeclipError, match="a letter first"):
        curate(catalog, Shortest(), name=name)


def test_a_column_of_another_origin_is_not_replaced(catalog: Catalog) -> None:
    catalog.add_columns({"mine_kept": np.ones(ROWS, bool)})
    with pytest.raises(ModeclipError, match="'mine_kept' that no curation made"):
        curate(catalog, Shortest(), name="mine")


def test_two_at_once_are_refused_in_one_line(catalog: Catalog) -> None:
    folder = Path(catalog.path) / "_modeclip" / "curation"
    folder.mkdir(parents=True)
    code = (
        f"from modeclip.system.files import only_process; from pathlib import Path; import time\n"
        f"with only_process(Path({str(folder)!r})): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(ModeclipError, match="at work in this folder"):
                curate(catalog, Shortest())
        finally:
            holder.send_signal(signal.SIGKILL)
    assert curate(catalog, Shortest()).num_computed == ROWS


def test_a_draw_depends_on_the_pair_and_the_seed_alone() -> None:
    keys = [f"key {number}" for number in range(20_000)]
    draws = draw(3, keys)
    order = np.random.default_rng(0).permutation(len(keys))
    assert (draw(3, [keys[place] for place in order]) == draws[order]).all()
    assert (draw(3, keys[:10]) == draws[:10]).all()
    assert (draw(4, keys) != draws).all()
    assert (draw(3, ["ab"], ["c"]) != draw(3, ["a"], ["bc"])).all()
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = len(keys) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared with 19 degrees of freedom: 1 in 1,000


KILLED = """
import os, signal, sys
from modeclip import Catalog, curate
from modeclip.data.storage import Ledger
left, add = int(sys.argv[2]), Ledger.add

def dying(self, part, content):
    global left
    add(self, part, content)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

Ledger.add = dying
curate(Catalog.open(sys.argv[1]), "align", preset="small", side_above=0, max_words=3)
"""


@pytest.mark.slow
def test_a_killed_curation_goes_on_to_the_same_columns(tmp_path: Path) -> None:
    captions = [" ".join(["word"] * (1 + number % 6)) for number in range(ROWS)]
    killed, whole = (write_catalog(tmp_path / f"{name}.lance", captions) for name in ("killed", "whole"))
    for count in (4, 5):  # while fragments are counted, then while they are decided about
        done = subprocess.run([sys.executable, "-c", KILLED, killed.path, str(count)], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not curations_of(Catalog.open(killed.path))
    settings = {"preset": "small", "side_above": 0, "max_words": 3}
    for catalog in (killed, whole):
        curate(catalog, "align", **settings)
    assert (killed.read(["align_cause"])["align_cause"] == whole.read(["align_cause"])["align_cause"]).all()
    expected = [len(caption.split()) <= 3 for caption in captions]
    assert killed.read(["align_kept"])["align_kept"].tolist() == expected
