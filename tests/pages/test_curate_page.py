"""The pages of a curation show what the explanation says, as text, and load nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from modeclip.curation import surveying
from modeclip.curation.comparing import compare
from modeclip.curation.curating import Curated
from modeclip.curation.explaining import Explanation, explain
from modeclip.curation.method import Context, Curve, Decided, Histogram, Prepared, Table
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.pages.curate_page import place_chart, write_comparison, write_curation
from support import Element, parse_page, plain_png, unit_rows

EVIL = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7*7 }}"
ROWS = 90
CAUSES = ("seen before", f"cause {EVIL}", "never")


@dataclass(frozen=True, kw_only=True)
class Given:
    method: ClassVar[str] = "given"
    path: str = EVIL

    def prepare(self, context: Context) -> Prepared:
        raise NotImplementedError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Ninety pictures, one of them damaged, and captions and keys with code in them."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["filepath\ttitle"]
    for number in range(ROWS):
        (folder / f"{number} <b>.png").write_bytes(plain_png((number, 0, 0)))
        lines.append(f"{number} <b>.png\tthing {number // 3} {EVIL if number % 5 == 0 else ''}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    index(DataConfig(source=str(folder / "pairs.tsv")), folder)
    catalog = Catalog.open(folder / "catalog.lance")
    vectors = unit_rows(ROWS // 3, 8)[np.arange(ROWS) // 3].astype(np.float32)
    columns: dict[str, Any] = {"caption_embedding": vectors, "fine_cluster": (np.arange(ROWS) % 30).astype(np.int32)}
    catalog.add_columns(columns, facts={"made_by": "test"})
    catalog.add_columns({"odd": np.arange(ROWS) % 2 == 1, "low": np.arange(ROWS) < 40}, facts={"made_by": "test"})
    return catalog


@pytest.fixture(scope="module")
def explanation(catalog: Catalog) -> Explanation:
    cause = (np.arange(ROWS) % 3).astype(np.uint8)
    new = np.array([f"new {EVIL}" if n % 2 else None for n in range(ROWS)], object)
    values = {
        "given_cause": cause,
        "given_kept": cause == 0,
        "given_probability": np.where(cause == 0, 0.5, 0).astype(np.float32),
        "given_score": np.linspace(-1, 1, ROWS, dtype=np.float32),
        "given_caption": new,
        "given_of": np.where(cause == 1, 0, -1),
    }
    work = Decided(values={name: value for name, value in values.items() if name != "given_kept"}, facts={})
    prepared = Prepared(
        work=work,
        causes=CAUSES,
        tables=(Table(title=f"table {EVIL}", columns=("a", EVIL), rows=((EVIL, "17.25"), ("x", EVIL))),),
        charts=(
            Histogram(title=f"histogram {EVIL}", edges=(1.0, 2.0, 4.0), counts=(0, 7), threshold=3.0, is_log=True),
            Curve(
                title="curve", x=(1.0, 10.0), lines={"pairs": (1e6, 2e6), EVIL: (0.5, 0.1)}, x_label=EVIL, is_log=True
            ),
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surveying, "NUM_BATCHES", 4)
        given = Curated(
            catalog=catalog, name="given", method=Given(), prepared=prepared, num_computed=ROWS, values=values
        )
        return explain(given)


def check_harmless(page: Path) -> Element:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "<b>.png" not in text
    assert "49" not in re.findall(r"thing \d+ .*?(\d+)<", text)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', text)
    return parse_page(page)


def test_the_page_says_what_the_explanation_says(tmp_path: Path, catalog: Catalog, explanation: Explanation):
    page = write_curation(catalog, explanation, tmp_path / "new" / "folder")
    assert page.name == "curate.html"
    root = check_harmless(page)
    assert explanation.sentence in root.text
    assert "dry run" in root.text
    rows = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in root.all("tr")]
    assert ["kept", "30", "33.3 %", ""] in rows
    assert [CAUSES[1], "30", "33.3 %", ""] in rows
    assert ["never", "0", "0.0 %", ""] in rows
    assert [EVIL, "17.25"] in rows
    assert ["path", EVIL] in rows
    survey = explanation.survey
    before, after = survey.captions.spreads
    for words, values in {
        "Distinct": (f"{before.distinct:,.0f}", f"{after.distinct:,.0f}"),
        "Head": (f"{100 * before.head:.1f} %", f"{100 * after.head:.1f} %"),
        "Gini": (f"{before.gini:.3f}", f"{after.gini:.3f}"),
    }.items():
        assert any(row[0].startswith(words) and tuple(row[1:]) == values for row in rows), words
    for frequent in survey.captions.frequent:
        counts = [f"{count:,.1f}" if count != round(count) else f"{count:,.0f}" for count in frequent.counts]
        assert [" ".join(frequent.text.split()), *counts, ""] in rows
    assert survey.clusters
    shown = [row for row in root.all("tr") if "data-cluster" in row.attributes]
    assert [int(row.attributes["data-cluster"]) for row in shown] == [c.index for c in survey.clusters.clusters]
    for row, cluster in zip(shown, survey.clusters.clusters, strict=True):
        cells = [cell.text for cell in row.children if isinstance(cell, Element)]
        assert cells[1] == f"{cluster.counts[0]:,.0f}"
        assert cells[3] == f"{100 * cluster.counts[1] / cluster.counts[0]:.1f} %"
    met = f"{survey.negatives[0].kinds[0].false_per_pair.mean:.2f}"
    assert met in root.text
    groups = {one.attributes["data-group"]: one for one in root.all("article") if "data-group" in one.attributes}
    assert list(groups) == ["kept", "seen before", CAUSES[1]]
    for group in (explanation.kept, *explanation.causes[:2]):
        captions = [one.text for one in groups[group.name].all("figcaption")]
        wanted = [pair.caption + (f" → {pair.new_caption}" if pair.new_caption else "") for pair in group.pairs]
        assert [text.replace(" ", "") for text in captions] == ["".join(text.split()) for text in wanted]
        twins = groups[group.name].all(class_="copy-of")
        assert len(twins) == (10 if group.name == "seen before" else 0)
        assert len(groups[group.name].all("img")) == 10 + len(twins)
        assert all(pair.copy_of == (0 if twins else None) for pair in group.pairs)


def test_pictures_that_cannot_be_shown_say_why(tmp_path: Path, catalog: Catalog, explanation: Explanation):
    few = write_curation(catalog, explanation, tmp_path, picture_bytes=600)
    root = parse_page(few)
    shown, left_out = len(root.all("img")), [one.text for one in root.all(class_="gone")]
    assert 1 <= shown < 20
    assert sum(len(one.all("figcaption")) for one in root.all("article")) == 30
    assert all("as many pictures as it may" in text for text in left_out)
    first = explanation.kept.pairs[0]
    path = Path(catalog.read(["path"], np.array([first.row]))["path"][0])
    content = path.read_bytes()
    path.write_bytes(b"no picture")
    try:
        root = check_harmless(write_curation(catalog, explanation, tmp_path))
    finally:
        path.write_bytes(content)
    assert len(root.all("img")) == 39 - (10 if first.row == 0 else 0)
    assert len(root.all(class_="gone")) == 1 + (10 if first.row == 0 else 0)


def test_lines_of_other_scales_have_charts_of_their_own(explanation: Explanation):
    histogram, curve = explanation.charts
    assert isinstance(curve, Curve)
    assert [len(one["drawn"]["lines"]) for one in place_chart(curve)] == [1, 1]
    alike = replace(curve, lines={"a": (1.0, 2.0), "b": (3.0, 4.0)})
    assert [len(one["drawn"]["lines"]) for one in place_chart(alike)] == [2]
    (drawn,) = (one["drawn"] for one in place_chart(histogram))
    left, upper, right, lower = drawn["frame"]
    assert left < drawn["threshold"] < right
    (bar,) = drawn["bars"]
    assert bar["counts"] == [7.0]
    assert bar["x"] == pytest.approx((left + right) / 2, abs=1)  # half of an axis of two octaves
    assert bar["y"] + bar["height"] == pytest.approx(lower)
    assert bar["y"] > upper


def test_a_page_compares_two_selections(tmp_path: Path, catalog: Catalog):
    found = compare(catalog, "odd", "low")
    page = write_comparison(catalog, found, tmp_path)
    assert page.name == "compare.html"
    root = check_harmless(page)
    assert found.sentence in root.text
    rows = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in root.all("tr")]
    for group in found.groups:
        assert [group.name, f"{group.count}", f"{100 * group.share:.1f} %", ""] in rows
    assert [f"{found.groups[1].count} pairs" in one.text for one in root.all("h3") if "only odd" in one.text] == [True]


# the command


def test_the_command_prints_explains_and_compares(
    tmp_path: Path, icons_copy: Catalog, modeclip_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(surveying, "NUM_BATCHES", 4)
    options = ("align", "--preset", "small", "--min-words", "2")
    tried = modeclip_command("curate", icons_copy.path, *options, "--dry-run", "--out", tmp_path / "dry")
    assert tried.returncode == 0, tried.stderr
    assert "align_kept" not in Catalog.open(icons_copy.path).columns
    assert "nothing was written" in tried.stdout
    assert (tmp_path / "dry" / "curate.html").exists()
    done = modeclip_command("curate", icons_copy.path, *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kept = Catalog.open(icons_copy.path).read(["align_kept", "align_cause"])
    assert found["num_kept"] == kept["align_kept"].sum()
    assert [one["count"] for one in found["causes"]] == [
        int((kept["align_cause"] == code).sum()) for code in range(1, len(found["causes"]) + 1)
    ]
    assert Path(found["page"]).parent == Path(icons_copy.path).parent / "curation" / "align"
    saved = json.loads((Path(found["page"]).parent / "curate.json").read_text(encoding="utf-8"))
    assert saved == {name: value for name, value in found.items() if name != "page"}
    for group in (found["kept"], *found["causes"]):
        assert group["name"][:24] in tried.stdout  # a long name goes on in the next line of its cell
        assert f"{group['count']:,}" in tried.stdout
    again = modeclip_command("curate", icons_copy.path, *options, "--column", "two", "--where", "width > 0")
    assert again.returncode == 0, again.stderr
    words = ("curate", icons_copy.path, "compare", "align", "two")
    same = modeclip_command(*words, "--json")
    assert json.loads(same.stdout)["jaccard"] == 1
    assert "Jaccard index 1.000" in modeclip_command(*words, "--out", tmp_path / "compare").stdout
    assert (tmp_path / "compare" / "compare.html").exists()
    (tmp_path / "file").touch()
    wrong = ((*words[:3], "align"), (*words, "--out", tmp_path / "file"), (*words[:3], "align", "nobody"))
    for mistake in wrong:
        refused = modeclip_command(*mistake)
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()) == 1
