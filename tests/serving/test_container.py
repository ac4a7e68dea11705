"""The container file, where there is nothing to build it: its instructions, its user, and what it copies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modeclip.commands import pilot
from modeclip.data.sources.options import DataConfig
from modeclip.pipeline.pilot_plan import PilotConfig
from modeclip.pipeline.stages import RunResult

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], " ".join(line.split()[1:])) for line in lines if line.strip()]


def test_the_container_runs_as_a_user_and_takes_only_what_it_needs() -> None:
    found = instructions()
    known = {
        "FROM",
        "ARG",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
    }
    assert {name for name, _ in found} <= known
    assert all(re.search(r":[\w.-]*\d", what.split()[0]) for name, what in found if name == "FROM")  # no :latest
    users = [what for name, what in found if name == "USER"]
    assert users
    assert users[-1] not in {"0", "root"}
    order = [name for name, _ in found]
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert dict(found)["ENTRYPOINT"].startswith('["modeclip", "serve"')
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, what in found:
        if name == "COPY" and not what.startswith("--from"):
            sources = set(what.split()[:-1])
            assert sources <= let_in
            assert all((ROOT / source).exists() for source in sources)


def test_the_demo_ends_with_the_command_that_serves_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = {name: tmp_path / "my demo" / name for name in ("report", "bundle")}
    result = RunResult(folder=tmp_path / "my demo", results={}, **paths)
    monkeypatch.setattr("modeclip.pipeline.stages.run", lambda *_: result)
    asked: list[tuple[str, Path]] = []

    def tried(data: DataConfig, _: PilotConfig, folder: Path) -> dict[str, int]:
        asked.append((data.source, folder))
        return {"num_classes": 20}

    monkeypatch.setattr("modeclip.pipeline.pilot.pilot", tried)
    for told_before in ("_print_first_use", "_print_pilot"):
        monkeypatch.setattr(pilot, told_before, lambda *_: None)
    pilot.demo(tmp_path / "my demo")
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"modeclip serve '{tmp_path / 'my demo'}'"
    assert said[0].startswith("what to train for 20 class names?")
    assert pilot.LONGER in said
    assert asked == [("icons", tmp_path / "my demo" / "pilot")]
