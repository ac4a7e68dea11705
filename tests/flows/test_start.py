"""Commands start without the libraries that they do not need; benchmarks/start.py measures what that is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "fastapi",
    "lance",
    "open_clip",
    "pyarrow",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "timm",
    "torch",
    "transformers",
}


def heavy_modules(*words: str) -> set[str]:
    """Return the heavy libraries that a command has imported when it ends."""
    code = (
        "import json, sys\n"
        "from modeclip.commands import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print(json.dumps(sorted({HEAVY} & set(sys.modules))), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("words", [("--help",), ("serve", "--help")])
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    assert heavy_modules(*words) == set()


@pytest.mark.slow
def test_route_needs_torch_and_no_library_of_models(small_run: Path) -> None:
    found = heavy_modules("route", str(small_run / "bundle"), "--classes", "cat,dog")
    assert found & {"open_clip", "sentence_transformers", "timm", "transformers"} == set()
    assert "torch" in found, "the list of modules is that of the command"
