"""Work on a catalog's fragments: the same bytes whoever does it, nothing done twice, kills leave nothing half-done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modeclip.clustering.embedding import EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, cluster
from modeclip.curation.curating import curate
from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS, Catalog
from modeclip.data.mapping import POSITION, concatenate, map_columns, map_fragments
from modeclip.data.storage import FileWriter, append, create
from modeclip.errors import ModeclipError
from modeclip.search.index import Index

ROWS, FRAGMENT_ROWS = 60, 10
METADATA = {FORMAT: FORMAT_VERSION, FINGERPRINT: "f" * 32}


@dataclass
class Lengths:
    """Real work with a trace: the length of each caption and image, a line in a log for every block."""

    log: str
    inputs: tuple[str, ...] = ("caption",)
    outputs: tuple[str, ...] = ("length", "vector")
    unit: str = "captions"
    facts: dict[str, Any] = field(default_factory=lambda: {"made_by": "lengths"})
    die_at: str = ""
    """Caption at which the process dies the first time that it is met."""
    sleep: float = 0.0

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        captions = block["caption"].tolist()
        with Path(self.log).open("a") as file:
            file.write(f"start {captions[0]}\n")
        if self.die_at in captions and not Path(self.log + ".died").exists():
            Path(self.log + ".died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if "bad caption" in captions:
            raise ModeclipError("caption 'bad caption' cannot be used")
        time.sleep(self.sleep)
        with Path(self.log).open("a") as file:
            file.write(f"end {captions[0]}\n")
        lengths = np.array([len(caption) for caption in captions], np.int32)
        if "image" in self.inputs:
            lengths += np.array([len(image) for image in block["image"]], np.int32)
        return {"length": lengths, "vector": np.stack([lengths, lengths**2], axis=1).astype(np.float16)}


def rows_of(first: int, count: int, caption: str = "caption", captions: Sequence[str] = ()) -> pa.Table:
    numbers = range(first, first + count)
    values = {
        "key": [f"key {n}" for n in numbers],
        "caption": list(captions) or [f"{caption} {n}" for n in numbers],
        "image": [bytes(n) for n in numbers],
        "path": [None] * count,
        "offset": [0] * count,
        "size": list(numbers),
        "width": [4] * count,
        "height": [4] * count,
        "digest": [bytes(16)] * count,
        "group": ["a"] * count,
    }
    return pa.table(values, schema=pa.schema([(name, PAIR_COLUMNS[name]) for name in values]))


def write_catalog(path: Path, captions: Sequence[str] = ()) -> Catalog:
    writer = FileWriter(str(path), rows_of(0, 1).schema, max_rows=FRAGMENT_ROWS)
    writer.write(rows_of(0, ROWS, captions=captions))
    create(str(path), writer.schema.with_metadata(METADATA), writer.finish())
    return Catalog.open(path)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return write_catalog(tmp_path / "c.lance")


@pytest.fixture
def work(tmp_path: Path) -> Lengths:
    return Lengths(str(tmp_path / "log"))


def ended(work: Lengths) -> Counter[str]:
    """How often each fragment was worked on to the end, by its first caption."""
    return Counter(line[4:] for line in Path(work.log).read_text().splitlines() if line.startswith("end "))


def column_bytes(catalog: Catalog) -> list[bytes]:
    """The files of the two columns, fragment by fragment, byte by byte."""
    wanted = {f.id() for f in catalog.dataset.lance_schema.fields() if f.name() in ("length", "vector")}
    files = [
        file.path
        for fragment in catalog.dataset.get_fragments()
        for file in fragment.data_files()
        if wanted & set(file.fields)
    ]
    return [Path(catalog.path, "data", name).read_bytes() for name in files]


def expected(captions: list[str]) -> np.ndarray:
    return np.array([len(caption) for caption in captions], np.int32)


EACH_ONCE = {f"caption {n}": 1 for n in range(0, ROWS, FRAGMENT_ROWS)}


# ---------------------------------------------------------------- in this process


def test_each_fragment_is_computed_once_and_never_again(catalog: Catalog, work: Lengths):
    assert map_columns(catalog, work, "lengths") == ROWS
    assert map_columns(Catalog.open(catalog.path), work, "lengths") == 0
    assert ended(work) == EACH_ONCE
    opened = Catalog.open(catalog.path)
    columns = opened.read(["caption", "length", "vector"])
    assert (columns["length"] == expected(columns["caption"].tolist())).all()
    assert (columns["vector"][:, 1] == columns["length"] ** 2).all()
    assert opened.facts("length") == opened.facts("vector") == {"made_by": "lengths"}
    assert not list(Path(catalog.path, "_modeclip").glob("map*"))


def test_images_are_work_too(catalog: Catalog, work: Lengths):
    work.inputs = ("caption", "image")
    map_columns(catalog, work, "lengths")
    columns = catalog.read(["caption", "length"])
    assert (columns["length"] == expected(columns["caption"].tolist()) + np.arange(ROWS)).all()


def test_other_work_replaces_the_columns(catalog: Catalog, work: Lengths):
    map_columns(catalog, work, "lengths")
    work.facts = {"made_by": "another"}
    assert map_columns(catalog, work, "lengths") == ROWS
    assert catalog.facts("length") == {"made_by": "another"}
    assert catalog.columns.count("length") == 1


def test_only_rows_that_came_later_are_computed(catalog: Catalog, work: Lengths):
    map_columns(catalog, work, "lengths")
    before = column_bytes(catalog)
    writer = FileWriter(catalog.path, rows_of(0, 1).schema)
    writer.write(rows_of(ROWS, 7, "new"))
    append(catalog.path, writer.finish(), METADATA)
    opened = Catalog.open(catalog.path)
    assert map_columns(opened, work, "lengths") == 7
    assert ended(work) == EACH_ONCE | {"new 60": 1}
    columns = Catalog.open(catalog.path).read(["caption", "length"])
    assert (columns["length"] == expected(columns["caption"].tolist())).all()
    assert column_bytes(opened)[:-1] == before


def test_an_error_leaves_the_old_columns_and_what_was_finished(catalog: Catalog, work: Lengths):
    map_columns(catalog, work, "lengths")
    bad = Lengths(work.log, facts={"made_by": "bad"}, die_at="never")
    broken = iter(range(100))

    class Failing(Lengths):
        def __call__(self, block):
            if next(broken) == 3:
                raise ModeclipError("the disk on which the model lay is gone")
            return super().__call__(block)

    failing = Failing(work.log, facts={"made_by": "bad"})
    with pytest.raises(ModeclipError, match="the model lay is gone"):
        map_columns(catalog, failing, "lengths")
    assert Catalog.open(catalog.path).facts("length") == {"made_by": "lengths"}
    count = ended(work).total()
    map_columns(Catalog.open(catalog.path), bad, "lengths")
    assert ended(work).total() == count + 3  # of six fragments three were there
    assert Catalog.open(catalog.path).facts("length") == {"made_by": "bad"}


def test_what_is_left_of_other_work_is_removed(catalog: Catalog, work: Lengths):
    class Failing(Lengths):
        def __call__(self, block):
            if block["caption"][0] == "caption 30":
                raise RuntimeError("stop")
            return super().__call__(block)

    with pytest.raises(RuntimeError, match="stop"):
        map_columns(catalog, Failing(work.log, facts={"made_by": "first"}), "lengths")
    map_columns(catalog, work, "lengths")
    used = {f.path for fragment in catalog.dataset.get_fragments() for f in fragment.data_files()}
    assert {path.name for path in Path(catalog.path, "data").iterdir()} == used


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import POSITION, concatenate, map_columns, map_fragments
from test_mapping import Lengths
map_columns(Catalog.open(sys.argv[1]), Lengths(sys.argv[2], sleep=0.2), "lengths")
"""


@pytest.mark.slow
def test_a_killed_map_goes_on_where_it_was(tmp_path: Path, catalog: Catalog, work: Lengths):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, catalog.path, work.log]
    for wanted in (2, 4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not Path(work.log).exists() or ended(work).total() < wanted:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Catalog.open(catalog.path).columns == catalog.columns
    work.sleep = 0.2
    map_columns(catalog, work, "lengths")
    counts = ended(work)
    assert set(counts) == set(EACH_ONCE)
    assert counts.total() <= len(EACH_ONCE) + 2  # at most the one that was being noted down at each kill
    other = write_catalog(tmp_path / "other.lance")
    map_columns(other, work, "lengths")
    assert column_bytes(other) == column_bytes(catalog)


# ---------------------------------------------------------------- on Ray


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    """A real Ray cluster of two workers on this machine."""
    ray = pytest.importorskip("ray")
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def in_module(work: Lengths) -> Any:
    """The same work, as Ray's workers can import it."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from test_mapping import Lengths as Importable
    finally:
        sys.path.pop(0)
    return Importable(**vars(work))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray's own
@pytest.mark.usefixtures("two_workers")
class TestRay:
    def test_ray_makes_the_same_bytes(self, tmp_path: Path, catalog: Catalog, work: Lengths):
        assert map_columns(catalog, in_module(work), "lengths", ray=True) == ROWS
        assert ended(work) == EACH_ONCE
        other = write_catalog(tmp_path / "other.lance")
        map_columns(other, work, "lengths")
        assert column_bytes(other) == column_bytes(catalog)
        assert other.facts("length") == catalog.facts("length")

    def test_a_dead_workers_fragment_is_done_again_and_no_other_twice(self, catalog: Catalog, work: Lengths):
        work.die_at = "caption 25"
        map_columns(catalog, in_module(work), "lengths", ray=True)
        assert Path(work.log + ".died").exists()
        starts = Counter(line[6:] for line in Path(work.log).read_text().splitlines() if line.startswith("start "))
        assert starts["caption 20"] == 2
        assert ended(work) == EACH_ONCE
        columns = catalog.read(["caption", "length"])
        assert (columns["length"] == expected(columns["caption"].tolist())).all()

    def test_a_users_mistake_in_a_worker_is_one_line_here(self, tmp_path: Path, work: Lengths):
        path = str(tmp_path / "bad.lance")
        writer = FileWriter(path, rows_of(0, 1).schema)
        table = rows_of(0, 2)
        writer.write(table.set_column(1, "caption", pa.array(["fine", "bad caption"])))
        create(path, writer.schema.with_metadata(METADATA), writer.finish())
        with pytest.raises(ModeclipError, match=r"^caption 'bad caption' cannot be used$"):
            map_columns(Catalog.open(path), in_module(work), "lengths", ray=True)

    def test_captions_are_embedded_and_assigned_alike_here_and_there(self, tmp_path: Path):
        captions = [f"{word} {thing}" for word in ("red", "tall", "old") for thing in ("house", "tree", "cat", "boat")]
        made = []
        for ray in (True, False):
            catalog = write_catalog(tmp_path / f"{ray}.lance", captions * 5)
            assert len(catalog.dataset.get_fragments()) == 6
            result = embed(catalog, EmbedConfig(encoder="minilm"), ray=ray)
            assert (result.num_captions, result.num_computed) == (ROWS, ROWS)
            clustering = cluster(catalog, ClusterConfig(num_fine=6, num_experts=2), ray=ray)
            columns = catalog.read(["caption_embedding", "fine_cluster", "fine_distance", "expert"])
            made.append({name: column.tobytes() for name, column in columns.items()} | {"cards": repr(clustering.fine)})
            assert catalog.facts("caption_embedding")["encoder"] == "minilm"
        assert made[0] == made[1]

    def test_a_pool_is_curated_alike_here_and_there(self, tmp_path: Path):
        captions = [" ".join(["word"] * (1 + number % 6)) for number in range(ROWS)]
        made = []
        for ray in (True, False):
            catalog = write_catalog(tmp_path / f"{ray}.lance", captions)
            curated = curate(catalog, "align", preset="small", side_above=0, max_words=3, ray=ray)
            made.append((curated.column("cause").tobytes(), catalog.facts("align_cause")))
        assert made[0] == made[1]
        assert catalog.read(["align_kept"])["align_kept"].tolist() == [len(text.split()) <= 3 for text in captions]

    def test_a_filter_a_dictionary_and_an_index_say_the_same_here_and_there(self, tmp_path: Path):
        from tests.curation.test_align import pair, write  # which imports from here

        from support import with_weights, write_wordnet  # which the processes of other tests here cannot

        captions = ("a small dog", "a mouse and a dog", "two hot dogs", "nothing known", "a tiny mouse", "dog")
        clip, words = with_weights("modeclip-icon-xxxs", tmp_path), f"wordnet:{write_wordnet(tmp_path / 'dict')}"
        made, scores, found = [], [], []
        for ray in (True, False):
            catalog = write(tmp_path / f"{ray}.lance", [pair(n, captions[n % 6]) for n in range(24)], max_rows=12)
            scored = curate(catalog, "dfn", filter=clip, score="sclip", fraction=0.5, contrast=8, ray=ray)
            explained = curate(catalog, "klite", knowledge=words, share=0.7, ray=ray)
            columns = [scored.column("cause"), explained.column("caption")]
            made.append([column.tolist() for column in columns] + [catalog.facts("klite_caption")])
            scores.append(scored.column("score"))
            index = Index.build(catalog, clip, tmp_path / f"{ray}.index", ray=ray)
            hits = index.search("a small dog", count=24).hits
            found.append([hit.score for hit in sorted(hits, key=lambda hit: hit.row)])
        assert made[0] == made[1]
        np.testing.assert_allclose(*found, atol=1e-3)  # of vectors in float16
        np.testing.assert_allclose(*scores, atol=0.01)  # of vectors in bfloat16, which depend on the number of threads
        assert 0 < sum(text is not None for text in made[0][1]) < 24


@dataclass
class Letters:
    """A statistic with a trace: how often each letter occurs, and the length of each caption."""

    log: str
    inputs: tuple[str, ...] = ("caption", POSITION)
    unit: str = "captions"
    facts: dict[str, Any] = field(default_factory=lambda: {"made_by": "letters"})

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        captions = block["caption"].tolist()
        with Path(self.log).open("a") as file:
            file.writelines(f"{caption}\n" for caption in captions)
        letters = np.frombuffer("".join(captions).encode(), np.uint8)
        return {
            "letters": np.bincount(letters, minlength=256),
            "lengths": np.array([len(caption) for caption in captions], np.int32),
            "rows": block[POSITION],
        }

    def merge(self, parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        letters = sum((part["letters"] for part in parts), np.zeros(256, np.int64))
        return concatenate([{name: part[name] for name in ("lengths", "rows")} for part in parts]) | {
            "letters": letters
        }


def test_a_statistic_counts_each_fragment_once_and_new_ones_later(catalog: Catalog, tmp_path: Path) -> None:
    captions = catalog.read(["caption"])["caption"].tolist()
    log = tmp_path / "log"
    first = map_fragments(catalog, Letters(str(log)), "count")
    assert len(first.computed) == len(first) == ROWS // FRAGMENT_ROWS
    total = first.total()
    assert {chr(code): int(n) for code, n in enumerate(total["letters"]) if n} == dict(Counter("".join(captions)))
    assert total["lengths"].tolist() == list(map(len, captions))
    assert total["rows"].tolist() == list(range(ROWS))
    assert map_fragments(catalog, Letters(str(log)), "count").computed == ()
    writer = FileWriter(catalog.path, rows_of(0, 1).schema)
    writer.write(rows_of(ROWS, 5))
    append(catalog.path, writer.finish(), METADATA)
    more = map_fragments(Catalog.open(catalog.path), Letters(str(log)), "count")
    assert len(more.computed) == 1
    assert more.total()["rows"].tolist() == list(range(ROWS + 5))
    assert len(log.read_text().splitlines()) == ROWS + 5
    assert "length" not in Catalog.open(catalog.path).columns


def test_a_statistic_of_selected_rows_sees_no_others(catalog: Catalog, tmp_path: Path) -> None:
    selected = np.random.default_rng(0).random(ROWS) < 0.4
    found = map_fragments(catalog, Letters(str(tmp_path / "log")), "count", selected=selected)
    assert found.total()["rows"].tolist() == np.flatnonzero(selected).tolist()
    selected[3] = not selected[3]  # the first fragment's selection changes, the others' does not
    assert map_fragments(catalog, Letters(str(tmp_path / "log")), "count", selected=selected).computed == (0,)


def test_a_damaged_statistic_is_counted_again(catalog: Catalog, tmp_path: Path) -> None:
    log = tmp_path / "log"
    expected = map_fragments(catalog, Letters(str(log)), "count").total()
    files = sorted(Path(catalog.path).glob("_modeclip/fragments-*/*.bin"))
    content = bytearray(files[2].read_bytes())
    content[-3] ^= 1
    files[2].write_bytes(content)
    files[3].unlink()
    found = map_fragments(catalog, Letters(str(log)), "count").total()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert len(log.read_text().splitlines()) == ROWS + 2 * FRAGMENT_ROWS


def test_rows_are_read_in_any_order_from_files_that_are_whole(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeclip.data.mapping.MAPPED_AT_ONCE", 2)
    selected = np.arange(ROWS) % FRAGMENT_ROWS != np.arange(ROWS) // FRAGMENT_ROWS
    selected[FRAGMENT_ROWS : 2 * FRAGMENT_ROWS] = False  # a fragment without rows
    found = map_fragments(catalog, Letters(str(tmp_path / "log")), "count", selected=selected)
    for path in sorted(Path(catalog.path).glob("_modeclip/fragments-*/*.bin"))[3:5]:
        path.write_bytes(path.read_bytes()[:-1])
    rows, expected = found.rows("rows"), np.flatnonzero(selected)
    assert len(rows) == len(expected)
    draw = np.random.default_rng(0)
    for some in (draw.permutation(len(rows)), draw.integers(0, len(rows), 200), np.array([7]), np.empty(0, np.int64)):
        assert rows[some].tolist() == expected[some].tolist()
    for part in (slice(None), slice(3, 41), slice(50, 1000)):
        assert rows[part].tolist() == expected[part].tolist()
    assert isinstance(rows._array(0), np.memmap)
    lengths = found.rows("lengths")[:]
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(text) for text in catalog.read(["caption"], expected)["caption"]]


def test_columns_that_a_check_refuses_are_not_shown(catalog: Catalog, tmp_path: Path) -> None:
    def refuse(blocks: Iterator[dict[str, np.ndarray]]) -> None:
        lengths = np.concatenate([block["length"] for block in blocks])
        raise ModeclipError(f"{lengths.sum()} letters")

    expected = sum(map(len, catalog.read(["caption"])["caption"]))
    before = sorted(Path(catalog.path, "data").iterdir())
    with pytest.raises(ModeclipError, match=f"^{expected} letters$"):
        map_columns(catalog, Lengths(str(tmp_path / "log")), "lengths", check=refuse)
    assert sorted(Path(catalog.path, "data").iterdir()) == before
    assert "length" not in Catalog.open(catalog.path).columns
    assert map_columns(catalog, Lengths(str(tmp_path / "log")), "lengths") == ROWS
