"""What the commands share: options that several of them have, and how a command is called with the words it was given.

A command is a function whose parameters are its options. A parameter may be a whole config: each of its fields is an
option then, with the string under the field as its help. What a config refuses is raised as it is, so that the
command line can print it in one line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from modeclip.errors import ModeclipError

AsJson = Annotated[bool, arg(name="json", help="Print JSON for machines instead of a table.")]
CatalogPath = Positional[
    Annotated[str, arg(help="What `modeclip index` wrote: a folder, catalog.lance in it, or an address (s3://...).")]
]
Ray = Annotated[
    bool, arg(help="Work on the Ray cluster of RAY_ADDRESS, one that runs on this machine, or a new one on it.")
]
MaxMemory = Annotated[float | None, arg(help="Use as many experts as fit into this many GB (10^9 bytes).")]


class _RefusedError(Exception):
    """Carries what a config refused past tyro, which prints the ValueError of a config in a box of several lines."""

    def __init__(self, reason: ModeclipError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def call(command: Callable[..., Any], words: Sequence[str], prog: str | None = None) -> Any:
    """Call a command with the words of a command line, and return what it returns.

    Args:
        command: Its parameters and their annotations say which words there are.
        words: As a shell gives them, without the names of program and command.
        prog: What the help calls the command.

    Raises:
        ModeclipError: A config refuses a value, or the command fails.
        SystemExit: The words ask for help (code 0), or do not fit the command (code 2); something was printed then.
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_ConfigRule())
    try:
        return tyro.cli(command, args=words, prog=prog, registry=registry)
    except _RefusedError as refused:
        raise refused.reason from None


def to_bytes(gigabytes: float | None) -> int | None:
    """Return the bytes of ``--max-memory``.

    Raises:
        ModeclipError: The number is not above 0.
    """
    if gigabytes is None:
        return None
    if not 0 < gigabytes < math.inf:
        raise ModeclipError(f"--max-memory: expected a number of GB above 0, got {gigabytes:g}")
    return int(gigabytes * 1e9)


class _ConfigRule:
    """The rule by which tyro makes a config: as any dataclass, but help is one paragraph and errors are its own."""

    def __init__(self) -> None:
        self.is_asking = False

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if self.is_asking or not is_dataclass(info.type) or not info.type.__module__.startswith("modeclip."):
            return None
        self.is_asking = True  # what is asked for next is tyro's own rule
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            self.is_asking = False
        assert isinstance(spec, StructConstructorSpec), "tyro knows dataclasses"
        fields = tuple(replace(field, helptext=_paragraph(field.helptext)) for field in spec.fields)
        return replace(spec, instantiate=_raising_refusals(info.type), fields=fields)


def _raising_refusals(config: type) -> Callable[..., Any]:
    @functools.wraps(config, updated=())
    def make(**values: Any) -> Any:
        try:
            return config(**values)
        except ModeclipError as error:
            raise _RefusedError(error) from None

    return make


def _paragraph(text: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """Return the help of a field as a terminal shows it best: without the line breaks and marks of the source."""

    def help_text() -> str | None:
        found = text() if callable(text) else text
        return None if found is None else " ".join(found.replace("``", "`").split())

    return help_text
