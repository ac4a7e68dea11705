"""The README and the documentation say what is true: their commands run, their links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import modeclip
from modeclip.mixture.rules import route
from support import python

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"<!-- test: (\w+) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
Command = Callable[..., subprocess.CompletedProcess[str]]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def marked_blocks(kind: str) -> list[tuple[str, str]]:
    """Return (page, code) of every fenced block that stands under a ``test: KIND`` comment."""
    return [
        (page.name, code)
        for page in PAGES
        for mark, code in FENCE.findall(page.read_text(encoding="utf-8"))
        if mark == kind
    ]


def commands() -> list[str]:
    """Return the marked shell commands, one a line."""
    return [
        line
        for _, block in marked_blocks("shell")
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in the root of the repository."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pages_have_marked_examples() -> None:
    assert len(commands()) >= 2
    assert len(marked_blocks("python")) == 1
    assert len(marked_blocks("recipe")) >= 2


@pytest.mark.parametrize("command", commands())
def test_command_runs(
    command: str, small_run: Path, modeclip_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command.replace("runs/demo", str(small_run)))
    assert program == "modeclip"
    done = modeclip_command(*words)
    assert done.returncode == 0, done.stderr
    assert "heart" in done.stdout


def test_python_example_runs(small_run: Path) -> None:
    [(_, code)] = marked_blocks("python")
    done = python("-c", code.replace("runs/demo", str(small_run)))
    assert done.returncode == 0, done.stderr
    assert "heart" in done.stdout


def test_make_demo_is_the_documented_command() -> None:
    done = run(["make", "--no-print-directory", "--dry-run", "--always-make", "demo"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/modeclip demo --out runs/demo")
    assert "`modeclip demo --out runs/demo`" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", [recipe for _, recipe in marked_blocks("recipe")])
def test_recipe_is_accepted(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(recipe, encoding="utf-8")
    assert modeclip.load_recipe(tmp_path / "my.yaml").name == "my"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = [
        target
        for target in LINK.findall(text)
        if not re.match(r"\w+:|#", target) and not (page.parent / target.split("#")[0]).exists()
    ]
    assert not missing


def test_pages_say_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    stale = importlib.import_module("hooks").stale_files()
    assert not stale, "fill them in: python docs/hooks.py, or make format"


def test_picture_of_the_ways_to_one_model_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "one_model_picture.py"))
    assert script["PICTURE"].read_text(encoding="utf-8") == script["draw"](), "python docs/one_model_picture.py"


def test_routing_table_of_the_method_page_is_what_route_computes() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = text.split("<!-- table: routing -->")[1]
    header = [cell.strip(" `") for cell in table.strip().splitlines()[0].strip("|").split("|")]
    rows = re.findall(r"^\| \d+ \((\d+):(\d+)\) \|(.*)\|$", table, re.MULTILINE)
    assert len(rows) == 6
    for first, second, cells in rows:
        distance, *expected = (float(cell) for cell in cells.split("|"))
        for rule, weight in zip(header[2:], expected, strict=True):
            got = two_expert_weight(int(first), int(second), distance, rule)
            assert got == pytest.approx(weight, abs=5e-4), (first, second, distance, rule)


def two_expert_weight(first: int, second: int, distance: float, rule: str) -> float:
    """Weight of expert 0 when `first` classes lie at `distance` from its centre, `second` from the other."""
    centers = np.eye(3, dtype=np.float32)[:2]
    cosine = 1 - distance**2 / 2
    beside = np.array([0, 0, np.sqrt(1 - cosine**2)])
    classes = np.stack([cosine * centers[0] + beside] * first + [cosine * centers[1] + beside] * second)
    experts = np.array([0, 1])
    return float(route(classes, centers.astype(np.float64), experts, num_experts=2, rule=rule).weights[0])


def test_readme_has_every_package_in_the_order_of_the_import_contract() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1]
    listed = re.findall(r"^  (\w+)(?:\.py|/) ", tree, re.MULTILINE)
    assert listed == layers[::-1]
    there = {path.stem for path in (ROOT / "src" / "modeclip").iterdir() if (path / "__init__.py").exists()}
    there |= {path.stem for path in (ROOT / "src" / "modeclip").glob("*.py")} - {"__init__"}
    assert set(listed) == there


def test_every_package_has_a_contract_for_its_files() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ordered = {
        container
        for contract in config["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers" and contract.get("exhaustive")
        for container in contract["containers"]
    }
    root = ROOT / "src"
    packages = {".".join(path.parent.relative_to(root).parts) for path in root.rglob("__init__.py")}
    assert ordered == packages


def test_public_names_are_sorted_and_few() -> None:
    assert list(modeclip.__all__) == sorted(modeclip.__all__)
    assert len(modeclip.__all__) <= 25
    for name in modeclip.__all__:
        assert getattr(modeclip, name) is not None, name


def test_all_names_what_is_public() -> None:
    # Names are loaded at their first use; the imports for type checkers are the list of them that tools read.
    tree = ast.parse(Path(modeclip.__file__).read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in guarded for node in block.body if isinstance(node, ast.ImportFrom)]
    names = {
        alias.asname or alias.name
        for node in imports
        if (node.module or "").startswith("modeclip")
        for alias in node.names
    }
    assert names == set(modeclip.__all__)


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, modeclip\n"
        "heavy = {'torch', 'open_clip', 'sentence_transformers', 'sklearn', 'lance'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_no_registry_is_named_in_tracked_files() -> None:
    # Where packages come from is the user's setting. The names are put together here so that this file passes too.
    hosts = [".".join(words) for words in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))]
    options = ["--" + name for name in ("index-url", "extra-index-url", "find-links", "trusted-host")]
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"])
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".png", ".webp"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{name}: {word}" for word in [*hosts, *options] if word in text]
    assert not found


def test_constraints_are_names_and_numbers() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [pin for pin in pins if not re.fullmatch(r"[\w.-]+==\d[\w.]*", pin)]
    assert not wrong
