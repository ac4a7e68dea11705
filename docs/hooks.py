"""What the documentation takes from the code, so that one fact stands in one place.

Five marks in a Markdown page are replaced when the site is built:

* a comment ``config: ClusterConfig`` becomes a table of that dataclass: field, type,
  default, and the string that stands under the field;
* a comment ``help: cluster`` becomes what ``modeclip cluster --help`` prints (``help: modeclip``
  is the list of commands);
* a comment ``block: README.md result table`` becomes what stands in that file between the comments
  ``result table: begin`` and ``result table: end``;
* a comment ``file: PATH`` becomes that file as a code block;
* a fenced block ``math``, or code in dollar signs, becomes MathML: no script, no network.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
HELP_COLUMNS = 84  # what fits the page
RUN_COMMAND = "import sys; sys.argv[0] = 'modeclip'; from modeclip.commands import main; main()"


def find_class(name: str) -> ast.ClassDef:
    """Return the syntax tree of the class of that name in the package."""
    for path in sorted((ROOT / "src" / "modeclip").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
    raise PluginError(f"documentation asks for the class {name}, which no file of the package defines")


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
    text = re.sub(r"Annotated\[(\w+), .*\]", r"\1", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " | "), text)
    text = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", text)
    return text.replace(" | ", " or ").replace("None", "none")


def config_table(name: str) -> str:
    """Return the Markdown table of a config dataclass."""
    body = find_class(name).body
    rows = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
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
    words = [] if command == "modeclip" else command.split()
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMAND, *words, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": str(HELP_COLUMNS), "NO_COLOR": "1", "TERM": "dumb"},
    )
    if done.returncode != 0:
        raise PluginError(f"modeclip {command} --help failed:\n{done.stderr[-2000:]}")
    lines = done.stdout.strip().splitlines()
    text = "\n".join(textwrap.fill(line, HELP_COLUMNS) if line[:1].isalpha() else line for line in lines)
    return f"```text\n{text}\n```"


def shared_block(file_name: str, title: str) -> str:
    """Return the text between two comments ``TITLE: begin`` and ``TITLE: end`` of a file."""
    text = (ROOT / file_name).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {title}: begin -->\n(.*?)<!-- {title}: end -->", text, re.DOTALL)
    if found is None:
        raise PluginError(f"{file_name} has no block {title!r} between begin and end comments")
    return found[1].strip()


def file_block(file_name: str) -> str:
    """Return a file of the repository as a fenced block."""
    path = ROOT / file_name
    if not path.exists():
        raise PluginError(f"documentation asks for {path}, which is not there")
    return f"```{path.suffix[1:]}\n{path.read_text(encoding='utf-8').strip()}\n```"


def render_formulas(markdown: str) -> str:
    """Replace LaTeX in ``math`` fences and in dollar-and-backtick code by MathML."""

    def block(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(match[1].strip(), display="block")}</div>'

    def inline(match: re.Match[str]) -> str:
        return f"<span>{convert(match[1])}</span>"  # the span keeps Markdown from seeing a block

    markdown = re.sub(r"^```math\n(.*?)^```$", block, markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\$`([^`\n]+)`\$", inline, markdown)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the marks of one page (called by MkDocs)."""
    markdown = re.sub(r"<!-- config: (\w+) -->", lambda found: config_table(found[1]), markdown)
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda found: file_block(found[1]), markdown)
    markdown = re.sub(r"<!-- help: ([\w -]+?) -->", lambda found: command_help(found[1]), markdown)
    markdown = re.sub(r"<!-- block: (\S+) ([\w ]+?) -->", lambda found: shared_block(found[1], found[2]), markdown)
    return render_formulas(markdown)
