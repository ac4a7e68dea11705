"""The command line: a command parses its words, calls one function and prints what that returns.

A user's mistake is one line on standard error and exit code 2; of several processes on a machine, one prints it.
Results go to standard output, as a table or with ``--json``; progress goes to standard error. Only the module of the
command that was asked for is imported.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files

import tyro

from modeclip.errors import ModeclipError, in_one_line, unknown
from modeclip.system.console import log, open_streams, printable
from modeclip.system.options import call

PIPE_CLOSED = 128 + 13
"""Exit code of a command whose reader has gone (SIGPIPE is 13), as shells give it."""
COMMANDS = {
    "demo": "pilot",
    "run": "runs",
    "pilot": "pilot",
    "index": "data",
    "check": "data",
    "uids": "data",
    "embed": "data",
    "curate": "curation",
    "cluster": "data",
    "atlas": "data",
    "train": "training",
    "train-experts": "training",
    "status": "training",
    "route": "mixture",
    "classify": "mixture",
    "evaluate": "evaluation",
    "compare": "evaluation",
    "scaling": "evaluation",
    "report": "runs",
    "search": "search",
    "serve": "serving",
    "assign": "mixture",
    "extend": "mixture",
    "bundle": "mixture",
    "finetune": "adapting",
    "merge": "adapting",
    "upcycle": "one_model",
    "distill": "one_model",
    "export": "one_model",
}
"""Module of each command, a function of the command's name in it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what the ``modeclip`` command calls."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    try:
        try:
            _check_words(words)
            _run(words)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is still ours to handle
    except ModeclipError as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        _drop_output()
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as error:
        _drop_output()
        _fail(in_one_line(error))
    except KeyboardInterrupt:
        log("stopped; run the same command again to continue")
        raise SystemExit(130) from None


def _check_words(words: Sequence[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = word.encode(errors="backslashreplace").decode()
            raise ModeclipError(
                f"argument '{shown}': expected UTF-8, got {word[error.start]!a} at position {error.start};"
                " set the terminal to UTF-8, or rename the file"
            ) from None


def _drop_output() -> None:
    """Send what standard output still holds nowhere: Python would write it at its end, and fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: Sequence[str]) -> None:
    name = words[0].replace("_", "-") if words else ""
    if name in {"curate", "search"}:
        command, rest, prog = import_module(f"{__name__}.{COMMANDS[name]}").choose(words[1:])
        call(command, rest, prog=prog)
        return
    if name in COMMANDS:
        call(load_command(name), words[1:], prog=f"modeclip {name}")
        return
    if words and words[0] == "--version":
        print(f"modeclip {version('modeclip')}")
        return
    if words and not words[0].startswith("-"):
        raise unknown("command", words[0], COMMANDS, "modeclip --help")
    if words and not name.startswith("--tyro-") and words[0] not in {"-h", "--help"}:
        raise unknown("option", words[0], ["--help", "--version"])
    if name.startswith("--tyro-"):  # the completion of a shell, which knows the options of every command
        commands = {name: load_command(name) for name in COMMANDS}
    else:
        commands = {name: _stand_in(summary) for name, summary in read_summaries().items()}
    description = "CLIP data experts: cluster, train, route, evaluate. --version prints the version."
    shown = words or ["--help"]
    tyro.extras.subcommand_cli_from_dict(commands, prog="modeclip", description=description, args=shown)


def load_command(name: str) -> Callable[..., None]:
    """Import a command, by its name on the command line."""
    command: Callable[..., None] = getattr(import_module(f"{__name__}.{COMMANDS[name]}"), name.replace("-", "_"))
    return command


def read_summaries() -> dict[str, str]:
    """Return the docstring of each command, read from the source, since importing all of them takes seconds."""
    found: dict[str, str] = {}
    for module in dict.fromkeys(COMMANDS.values()):
        source = ast.parse((files(__name__) / f"{module}.py").read_text(encoding="utf-8"))
        functions = (node for node in source.body if isinstance(node, ast.FunctionDef))
        found |= {node.name.replace("_", "-"): ast.get_docstring(node) or "" for node in functions}
    return {name: found[name] for name in COMMANDS}


def _stand_in(summary: str) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError("a command by its name is called before all are listed")

    command.__doc__ = summary
    return command


def _fail(message: str) -> None:
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":  # the others have met the same
        with suppress(OSError):  # a full disk, where standard error goes to a file
            print(f"modeclip: error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)
