"""What the documentation takes from the code, so that one fact stands in one place.

Comments in a Markdown page mark blocks that this file fills in, up to a comment ``end``. They are filled in the
repository (``python docs/hooks.py``, or ``make format``), so that the pages can be read as they lie there; a test
compares them with the code:

* ``config: ClusterConfig`` is a table of that dataclass: field, type, default, and the string that stands under the
  field;
* ``help: cluster`` is what ``modeclip cluster --help`` prints (``help: modeclip`` is the list of commands);
* ``block: README.md result table`` is what stands in that file between the comments ``result table: begin`` and
  ``result table: end``;
* ``file: PATH`` is that file as a code block;
* ``files: PACKAGE`` is a table of that package's files with the first line of their docstrings;
* ``api: PACKAGE`` is a table of what each of its files offers, in the order of their imports; in the site the whole
  documentation of the modules takes its place;
* ``walk: TITLE`` with a line ``MODULE | what happens there`` for every step is a numbered list, and ``house`` the
  picture of all packages and files with these walks on it.

When the site is built a fenced block ``math``, or code in dollar signs, becomes MathML: no script, no network.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
HELP_COLUMNS = 84  # what fits the page


def find_class(name: str) -> ast.ClassDef:
    """Return the syntax tree of the class of that name in the package."""
    for path in sorted((ROOT / "src" / "modeclip").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
    raise PluginError(f"documentation asks for the class {name}, which no file of the package defines")


def find_constant(name: str) -> ast.expr:
    """Return the value of a constant of the package."""
    for path in sorted((ROOT / "src" / "modeclip").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return node.value
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value is not None:
                return node.value
    raise PluginError(f"a default is {name}, which no file of the package defines")


def describe_default(value: ast.expr | None) -> str:
    """Return a field's default as YAML users read it."""
    if value is None:
        return "required"
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in keywords:
            return describe_default(keywords["default"])
        factory = ast.unparse(keywords["default_factory"])
        empty = {"dict": "`{}`", "list": "`[]`", "tuple": "`[]`"}
        return empty.get(factory, f"`{factory}()`")
    text = ast.unparse(value)
    if isinstance(value, ast.Name) and text.isupper():
        return describe_default(find_constant(text))
    try:
        literal = ast.literal_eval(value)
    except ValueError:
        return f"`{text}`"
    if literal is None:
        return "none"
    if isinstance(literal, bool):
        return f"`{str(literal).lower()}`"
    if isinstance(literal, tuple):
        return f"`[{', '.join(map(str, literal))}]`"
    return f"`{literal}`" if literal != "" else "empty"


def describe_type(annotation: ast.expr) -> str:
    """Return a field's type in plain words: ``str | None`` reads "str or none"."""
    text = ast.unparse(annotation)
    text = re.sub(r"Annotated\[(.+?), arg\(.*\)\]", r"\1", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " | "), text)
    text = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", text)
    return text.replace(" | ", " or ").replace("None", "none")


def config_table(name: str) -> str:
    """Return the Markdown table of a config dataclass, fields that it inherits first."""
    found = find_class(name)
    inherited = [find_class(base.id).body for base in found.bases if isinstance(base, ast.Name)]
    body = [node for nodes in [*inherited, found.body] for node in nodes]
    rows = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if "OmitArgPrefixes" in ast.unparse(node.annotation):
            continue  # a group of options without a section of its own, whose class has a table of its own
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if not isinstance(text, str):
            raise PluginError(f"{name}.{node.target.id}: no string under the field says what it means")
        meaning = " ".join(text.split()).replace("|", "\\|").replace("``", "`")
        default = describe_default(node.value).replace("|", "\\|")
        rows.append(f"| `{node.target.id}` | {describe_type(node.annotation)} | {default} | {meaning} |")
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


@cache
def command_help(command: str) -> str:
    """Return what ``modeclip COMMAND --help`` prints, as a fenced block."""
    from modeclip.commands import main

    words = [] if command == "modeclip" else command.split()
    surroundings = {"COLUMNS": str(HELP_COLUMNS), "NO_COLOR": "1", "TERM": "dumb"}
    with patch.dict(os.environ, surroundings), redirect_stdout(StringIO()) as printed:
        try:
            main([*words, "--help"])
        except SystemExit as stop:
            if stop.code:
                raise PluginError(f"modeclip {command} --help failed") from None
    lines = printed.getvalue().strip().splitlines()
    text = "\n".join(textwrap.fill(line, HELP_COLUMNS) if line[:1].isalpha() else line for line in lines)
    return f"```text\n{text}\n```"


def shared_block(file_name: str, title: str) -> str:
    """Return the text between two comments ``TITLE: begin`` and ``TITLE: end`` of a file, without comments in it."""
    text = (ROOT / file_name).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {title}: begin -->\n(.*?)<!-- {title}: end -->", text, re.DOTALL)
    if found is None:
        raise PluginError(f"{file_name} has no block {title!r} between begin and end comments")
    return re.sub(r"<!-- .*? -->\n", "", found[1]).strip()


def file_block(file_name: str) -> str:
    """Return a file of the repository as a fenced block."""
    path = ROOT / file_name
    if not path.exists():
        raise PluginError(f"documentation asks for {path}, which is not there")
    return f"```{path.suffix[1:]}\n{path.read_text(encoding='utf-8').strip()}\n```"


@dataclass(frozen=True)
class Module:
    """A file of the package."""

    name: str
    """Dotted, below ``modeclip``."""
    path: Path
    summary: str
    """First line of its docstring."""
    num_lines: int


@cache
def modules() -> dict[str, Module]:
    """Return every module of the package by its dotted name below ``modeclip``; packages by their own names."""
    root, found = ROOT / "src" / "modeclip", {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        if not summary:
            raise PluginError(f"{path} has no docstring that says what it is for")
        found[name] = Module(name, path, summary, text.count("\n"))
    return found


@cache
def layers(container: str) -> list[str]:
    """Return the children of a package in the order of their imports, first what all others may import."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    full = f"modeclip.{container}" if container else "modeclip"
    for contract in contracts:
        if contract["type"] == "layers" and full in contract["containers"]:
            words = [word.strip(" ()") for layer in contract["layers"] for word in re.split("[|:]", layer)]
            return words[::-1]
    raise PluginError(f"no import contract in pyproject.toml orders the files of {full}")


def members(package: str) -> list[Module]:
    """Return a package's files and, behind each sub-package's own, its files, in the order of their imports."""
    found = []
    for child in layers(package):
        name = f"{package}.{child}" if package else child
        found.append(modules()[name])
        if modules()[name].path.name == "__init__.py" and package:
            found += members(name)
    return found


def file_table(package: str) -> str:
    """Return the Markdown table of a package's files."""
    rows = [f"| `{place_of(module)}` | {module.summary.replace('|', chr(92) + '|')} |" for module in members(package)]
    return "\n".join(["| file | what it is for |", "|---|---|", *rows])


def place_of(module: Module) -> str:
    """Return where a module lies, below ``src/modeclip``."""
    return str(module.path.relative_to(ROOT / "src" / "modeclip"))


def documented(package: str) -> list[Module]:
    """Return the modules that the API page of a package documents."""
    return members(package) if modules()[package].path.name == "__init__.py" else [modules()[package]]


def api_tables(package: str) -> str:
    """Return what each module of a package offers: a heading, its purpose, a table of public classes and functions."""
    parts = []
    for module in documented(package):
        parts.append(f"## `{module.name}`\n\n{escape(module.summary)}")
        rows = []
        for node in ast.parse(module.path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                rows.append(f"| `{signature_of(node)}` | {escape(first_sentence(node))} |")
        if rows:
            parts.append("\n".join(["| name | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def signature_of(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return a class's name, or how a function is called: its parameters without their types."""
    if isinstance(node, ast.ClassDef):
        return node.name
    taken = node.args
    names = [argument.arg for argument in [*taken.posonlyargs, *taken.args]]
    names += [f"*{taken.vararg.arg}"] if taken.vararg else ["*"] if taken.kwonlyargs else []
    names += [argument.arg for argument in taken.kwonlyargs]
    names += [f"**{taken.kwarg.arg}"] if taken.kwarg else []
    return f"{node.name}({', '.join(names)})"


def first_sentence(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return the first line of a docstring."""
    return (ast.get_docstring(node) or "").partition("\n")[0]


def escape(text: str) -> str:
    """Return a docstring's line for a table of Markdown."""
    return text.replace("``", "`").replace("|", "\\|")


def api_of(package: str) -> str:
    """Return the marks by which mkdocstrings documents the modules of a package."""
    options = "    options: { show_root_heading: false, show_root_toc_entry: false }"
    return "\n\n".join(f"## `{m.name}`\n\n::: modeclip.{m.name}\n{options}" for m in documented(package))


def read_walks(markdown: str) -> dict[str, list[tuple[Module, str]]]:
    """Return the walks of a page: title to its steps, each a module and what happens there."""
    walks = {}
    for title, lines in re.findall(r"<!-- walk: (.+?)\n(.*?)-->", markdown, re.DOTALL):
        steps = []
        for line in lines.strip().splitlines():
            name, _, text = (part.strip() for part in line.partition("|"))
            if name not in modules():
                raise PluginError(f"walk {title!r}: modeclip has no module {name!r}")
            steps.append((modules()[name], text))
        walks[title] = steps
    return walks


def walk_list(steps: list[tuple[Module, str]]) -> str:
    """Return a walk as a numbered list."""
    return "\n".join(f"{n}. `{place_of(module)}` {text}" for n, (module, text) in enumerate(steps, 1))


ROOM, ROW, MARGIN, TITLE_WIDTH, HOUSE_WIDTH = 6, 24, 12, 104, 980
"""Pixels: between rooms, height of a row of rooms, around a floor, left of it for its name, of the whole."""
HOUSE_LABEL = "The packages of modeclip, a floor each, with a room for each file; dots are the steps of the walks"
HOUSE_STYLE = (
    "text{font:11px sans-serif;fill:#1f2430}.name{font-weight:700;font-size:13px}.floor{fill:#e8eaf0}"
    ".room{fill:#fff;stroke:#c3c8d4}.step{fill:#fff;text-anchor:middle;font-weight:700;font-size:9px}"
    "@media (prefers-color-scheme: dark){text{fill:#e6e9f0}.floor{fill:#2a2f3a}.room{fill:#1b1f27;stroke:#4a5160}}"
)
WALK_COLORS = ("#c2410c", "#1d4ed8", "#15803d")


def draw_house(walks: dict[str, list[tuple[Module, str]]]) -> str:
    """Return the house as SVG: a floor a package, a room a file, a numbered dot for each step of a walk."""
    shapes, places, y = [], {}, 8.0
    for package in layers(""):
        if package == "__main__":
            continue
        is_package = modules()[package].path.name == "__init__.py"
        x, top = float(TITLE_WIDTH + MARGIN), y
        y += MARGIN / 2
        for module in [m for m in members(package) if m.name != package] if is_package else [modules()[package]]:
            label = module.name.partition(".")[2] or module.name
            num_dots = sum(step.name == module.name for steps in walks.values() for step, _ in steps)
            width = 6.2 * len(label) + 16 + 16 * num_dots
            if x + width > HOUSE_WIDTH - MARGIN:
                x, y = float(TITLE_WIDTH + MARGIN), y + ROW + ROOM
            places[module.name] = (x, y, width)
            shapes.append(f'<rect class="room" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{ROW}" rx="4"/>')
            shapes.append(f'<text x="{x + 8:.0f}" y="{y + 16:.0f}">{label}</text>')
            x += width + ROOM
        y += ROW + MARGIN / 2
        places.setdefault(package, (TITLE_WIDTH - 34.0, top + 4, 30.0))
        floor = f'<rect class="floor" x="1" y="{top:.0f}" width="{HOUSE_WIDTH - 2}" height="{y - top:.0f}" rx="6"/>'
        shapes.insert(0, f'{floor}<text class="name" x="12" y="{top + 22:.0f}">{package}</text>')
        y += 6
    dots: dict[str, int] = {}
    for color, steps in zip(WALK_COLORS, walks.values(), strict=False):
        for number, (module, _) in enumerate(steps, 1):
            x, top, width = places[module.name]
            dots[module.name] = before = dots.get(module.name, 0)
            dots[module.name] += 1
            center = x + width - 10 - 16 * before
            shapes.append(f'<circle cx="{center:.0f}" cy="{top + ROW / 2:.0f}" r="7.5" fill="{color}"/>')
            shapes.append(f'<text class="step" x="{center:.0f}" y="{top + ROW / 2 + 3:.0f}">{number}</text>')
    for index, title in enumerate(walks):
        shapes.append(f'<circle cx="20" cy="{y + 12:.0f}" r="7.5" fill="{WALK_COLORS[index]}"/>')
        shapes.append(f'<text x="34" y="{y + 16:.0f}">{title}</text>')
        y += 22
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {HOUSE_WIDTH} {y + 8:.0f}" role="img"'
        f' aria-label="{HOUSE_LABEL}"><style>{HOUSE_STYLE}</style>' + "\n".join(shapes) + "</svg>"
    )


def render_formulas(markdown: str) -> str:
    """Replace LaTeX in ``math`` fences and in dollar-and-backtick code by MathML."""

    def block(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(match[1].strip(), display="block")}</div>'

    def inline(match: re.Match[str]) -> str:
        return f"<span>{convert(match[1])}</span>"  # the span keeps Markdown from seeing a block

    markdown = re.sub(r"^```math\n(.*?)^```$", block, markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\$`([^`\n]+)`\$", inline, markdown)


MARK = re.compile(
    r"(?P<mark><!-- (?P<kind>config|help|block|file|files|api|walk|house)(?::[ ]?(?P<words>[^\n]*?))?"
    r"(?:\n(?P<lines>[^<]*?))?[ ]?-->\n)(?:(?:(?!<!-- ).)*?<!-- end -->\n)?",
    re.DOTALL,
)


def fill(markdown: str) -> str:
    """Return a page with all its blocks filled in anew."""
    walks = read_walks(markdown)

    def made(found: re.Match[str]) -> str:
        kind, words = found["kind"], found["words"] or ""
        match kind:
            case "config":
                text = config_table(words)
            case "help":
                text = command_help(words)
            case "block":
                text = shared_block(*words.split(" ", 1))
            case "file":
                text = file_block(words)
            case "files":
                text = file_table(words)
            case "api":
                text = api_tables(words)
            case "walk":
                text = walk_list(walks[words])
            case _:
                text = f"![{HOUSE_LABEL}](assets/house.svg)"
        return f"{found['mark']}\n{text}\n\n<!-- end -->\n"

    return MARK.sub(made, markdown)


def stale_files() -> dict[Path, str]:
    """Return the files of the documentation that do not say what the code says, with what they should say."""
    found = {}
    for path in sorted(ROOT.glob("docs/**/*.md")):
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            found[path] = filled
        if "<!-- house -->" in text:
            picture, drawn = path.parent / "assets" / "house.svg", draw_house(read_walks(text)) + "\n"
            if not picture.exists() or picture.read_text(encoding="utf-8") != drawn:
                found[picture] = drawn
    return found


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the whole documentation of modules in the place of its tables, and render formulas (called by MkDocs)."""
    markdown = MARK.sub(lambda found: api_of(found["words"]) + "\n" if found["kind"] == "api" else found[0], markdown)
    return render_formulas(markdown)


if __name__ == "__main__":
    for path, text in stale_files().items():
        path.write_text(text, encoding="utf-8")
        print(f"filled in: {path.relative_to(ROOT)}")
