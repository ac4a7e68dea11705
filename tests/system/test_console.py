"""What is printed: text of strangers does nothing to a terminal, and tables fit the width that there is."""

from __future__ import annotations

import json

import pytest
from rich.cells import cell_len

from modeclip.system import console

HOSTILE = "[/bold]\x1b[31m:heart: [red]a\rb\x07\x9b2J\u202etxt.exe\u2066\u2028end\nmodeclip: error: no"
SHOWN = r"[/bold]\x1b[31m:heart: [red]a\rb\x07\x9b2J\u202etxt.exe\u2066\u2028end\nmodeclip: error: no"


def test_tables_logs_and_lines_show_what_would_act_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(HOSTILE, ["name", HOSTILE], [(HOSTILE, "1")])
    console.print_table(HOSTILE, ["name", HOSTILE], [(HOSTILE, "1")], in_parts=True)
    console.print_lines(HOSTILE)
    console.log(HOSTILE)
    with console.progress(HOSTILE, 1, "rows") as advance:
        advance(1)
    with console.busy(HOSTILE):
        pass
    out, err = capsys.readouterr()
    assert SHOWN in out.splitlines()
    assert SHOWN in err.splitlines()
    assert out.replace("\n", "").count("\\x1b[31m") >= 4
    assert not set(out + err) & set("\x1b\r\x07\x9b\u202e\u2066\u2028")


def test_bars_on_a_terminal_are_safe_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = console.Console(force_terminal=True, width=300, highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(console, "console", terminal)
    with console.progress(HOSTILE, 1, "rows") as advance:
        advance(1)
    assert SHOWN in capsys.readouterr().out


def test_json_is_the_same_text_with_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({HOSTILE: [HOSTILE, "größe"]})
    out = capsys.readouterr().out
    assert json.loads(out) == {HOSTILE: [HOSTILE, "größe"]}
    assert "größe" in out
    assert not set(out) & set("\x1b\r\x07\x9b\u202e\u2066\u2028")


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("num_columns", [1, 5, 40])
@pytest.mark.parametrize("num_rows", [1, 10])
def test_a_table_in_parts_shows_every_cell_within_the_width(
    width: int, num_columns: int, num_rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = [f"sugarcrepe/replace_{number:02}\nacc1" for number in range(num_columns)]
    rows = [
        (f"runs/a/bundle#expert-{row}", *(f"{row}.{column:02}" for column in range(num_columns)))
        for row in range(num_rows)
    ]
    console.print_table("accuracy", ["model", *columns], rows, in_parts=True)
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= width
    assert "…" not in out
    for row, *cells in rows:
        assert all(out.count(cell) == 1 for cell in cells), row


def test_a_table_without_columns_of_a_terminal_is_wide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    widths = {}
    for said in ("", "70", "none"):
        monkeypatch.setenv("COLUMNS", said)
        console.print_table("t", ["a", "b"], [("name", "word " * 60)])
        widths[said] = max(map(cell_len, capsys.readouterr().out.splitlines()))
    assert widths["70"] <= 70 < widths[""] == widths["none"] <= console.PIPE_WIDTH


def test_a_table_of_texts_that_has_no_room_cuts_no_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["finding", "severity", "pairs", "first of them", "what to do", "expert-0", "expert-1"]
    advice = "balance classes or filter captions " * 5
    row = (
        "one caption is that of more than 1 % of the pairs",
        "warning",
        "1,461",
        "sun " * 9,
        advice,
        "0.991",
        "0.007",
    )
    console.print_table("t", columns, [row])
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= 80
    assert "…" not in out
    for word in ("warning", "1,461", "balance", "captions", "0.991", "0.007", "severity", "expert-1"):
        assert word in out, word
