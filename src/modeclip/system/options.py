"""What the commands share: options that several of them have, and how a command is called with the words it was given.

A command is a function whose parameters are its options. A parameter may be a whole config: each of its fields is an
option then, with the string under the field as its help. What a config refuses, and words that fit no option, are
raised in one line, in which a setting has the name that it has on this command line.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import is_dataclass, replace
from itertools import takewhile
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from modeclip.errors import ModeclipError, unknown
from modeclip.system.console import worded
from modeclip.system.paths import expand_homes

AsJson = Annotated[bool, arg(name="json", help="Print JSON for machines instead of a table.")]
CatalogPath = Positional[
    Annotated[str, arg(help="What `modeclip index` wrote: a folder, catalog.lance in it, or an address (s3://...).")]
]
Ray = Annotated[
    bool, arg(help="Work on the Ray cluster of RAY_ADDRESS, one that runs on this machine, or a new one on it.")
]
Where = Annotated[
    tuple[str, ...],
    arg(
        help="Only pairs for which all of these hold: COLUMN=VALUE (site=north), a column of booleans, or a condition"
        " in SQL (\"width > 64 AND site = 'north'\").",
        metavar="CONDITION",
    ),
]
Mask = Annotated[
    str | None, arg(help="Only pairs that this column of booleans marks, or whose ids are in this .npy list.")
]
UserEncoder = Annotated[
    str | None,
    arg(
        name="encoder",
        help="Encoder of the captions, in place of the one that the file names; one that is Python code "
        "(MODULE:ATTRIBUTE) runs only if it is named here.",
    ),
]
MaxMemory = Annotated[float | None, arg(help="Use as many experts as fit into this many GB (10^9 bytes).")]


STAGES = (
    "align|assign|bundle|check|cluster|data|dfn|diagnose|duplicates|embed|evaluate|experts|extend|finetune|klite|merge|"
    "metaclip|pilot|scaling|serve|train"
)
"""What stands before the name of a field in messages, as in a recipe: ``train.samples``."""
KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path", "{None}": "None"}
"""What the words of tyro's help mean."""
_FIELD = re.compile(rf"(?<![\w./'\"-])(?:(?:{STAGES})\.(?:\w+\.)*(\w+)|([a-z]+_[a-z_]+))(?![\w/'\"=])(?!\.\w)")
"""A field of a recipe, or a name such as fields have; quoted and in paths it is something of the user's."""


class _RefusedError(Exception):
    """Carries what was refused past tyro, which prints a ValueError and its own findings in boxes of several lines."""

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
        ModeclipError: The words do not fit the command, a config refuses a value, or the command fails.
        SystemExit: The words ask for help, which was printed.
    """
    words = [expand_homes(word) for word in words]
    parser = _Parser(command, words, prog or command.__name__)
    parser.check_repeated()
    try:
        with _reporting(parser.refuse), worded(parser.in_flags):
            return parser.run(words)
    except _RefusedError as refused:
        raise ModeclipError(parser.in_flags(str(refused.reason), bare=True)) from None
    except ModeclipError as error:
        text = parser.in_flags(str(error), bare=True)
        if text == str(error):
            raise
        raise ModeclipError(text) from error


class _Parser:
    """What tyro makes of a command, and in what words its mistakes are reported."""

    def __init__(self, command: Callable[..., Any], words: Sequence[str], prog: str) -> None:
        self.command, self.words, self.prog = command, words, prog

    def run(self, words: Sequence[str]) -> Any:
        """Parse words and call the command."""
        registry = ConstructorRegistry()
        registry.struct_rule(_ConfigRule())
        return tyro.cli(self.command, args=words, prog=self.prog, registry=registry)

    @functools.cached_property
    def help(self) -> str:
        """The help of the command."""
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            self.run(["--help"])
        return re.sub(r"\x1b\[[\d;]*m", "", text.getvalue())

    @functools.cached_property
    def options(self) -> list[str]:
        """The options of the command."""
        lines = re.findall(r"^\W*?(-{1,2}\w.*)$", self.help, re.MULTILINE)
        return [option for line in lines for option in re.findall(r"(?:^|(?<=, ))--[\w-]+", line)]

    @functools.cached_property
    def flags(self) -> dict[str, str]:
        """The option of each field of the command's configs and of each other parameter; the name of what has none."""
        return {name: flag if flag in self.options else name.upper() for name, flag, _ in _flags_of(self.command)}

    def check_repeated(self) -> None:
        """Raise for an option of several values that is given again, since only the last ones would count."""
        options = [word for word in takewhile("--".__ne__, self.words) if word.startswith("--")]
        given = Counter(option.partition("=")[0].replace("_", "-") for option in options)
        for _, flag, kind in _flags_of(self.command):
            if given[flag] > 1 and _takes_several(kind):
                raise ModeclipError(
                    f"{flag}: given {given[flag]} times, expected once; give all its values behind one {flag} (A B)"
                )

    def in_flags(self, text: str, *, bare: bool = False) -> str:
        """Return a text in which the fields of recipes are called by the options of this command, if it has them.

        Args:
            text: What is printed. A name in quotes or in a path is something of the user's.
            bare: Take ``batch_size`` for a field too, as errors have it, and not only ``train.batch_size``.
        """

        def flag(found: re.Match[str]) -> str:
            field = found[1] or (found[2] if bare else "")
            return self.flags.get(field, found[0]) if field else found[0]

        return _FIELD.sub(flag, text)

    def refuse(self, event: Any) -> None:
        """Raise what is wrong with the words; ``event`` is one of tyro's, of which there may be new kinds."""
        tokens = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
        argument = getattr(event, "argument", None)
        if tokens:
            problem = self._unknown(tokens)
        elif missing := getattr(event, "missing_arguments", None):
            problem = (
                f"{self.prog}: missing {' and '.join(_name_of(one.arg) for one in missing)}; see {self.prog} --help"
            )
        elif choices := getattr(event, "choices", None):
            problem = str(unknown(f"value of {_name_of(argument)}", event.value, choices))
        elif argument is not None:
            problem = f"{_name_of(argument)}: expected {_kind_of(argument)}, got {self._value_of(argument)}"
        else:
            problem = (
                f"{self.prog}: {getattr(event, 'message', '') or 'these words do not fit'}; see {self.prog} --help"
            )
        raise _RefusedError(ModeclipError(" ".join(problem.split())))

    def _unknown(self, tokens: Sequence[str]) -> str:
        """Say which word is none of the command's."""
        options = [token.partition("=")[0] for token in tokens if token.startswith("-")]
        if not options:
            return f"{self.prog}: unexpected {tokens[0]!r}; an option stands before its value: see {self.prog} --help"
        return str(unknown("option", options[0], self.options, f"{self.prog} --help"))

    def _value_of(self, argument: Any) -> str:
        """Return what was given for an option, as far as the words tell."""
        flags = argument.lowered.name_or_flags
        for place, word in enumerate(self.words):
            name, equals, value = word.partition("=")
            if name.replace("_", "-") in flags:
                values = [value] if equals else self.words[place + 1 : place + 2]
                return repr(values[0]) if values and values[0] not in self.options else "none"
        return f"one of {' '.join(self.words)!r}"


def _reporting(refuse: Callable[[Any], None]) -> AbstractContextManager[None]:
    """Have tyro call a function before it prints what is wrong; the hook is young, and without it there are boxes."""
    hook = getattr(getattr(tyro, "_errors", None), "on_parse_error", None)
    return nullcontext() if hook is None else hook(refuse)


def _flags_of(owner: Callable[..., Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield name, option and type of each parameter of a command, or each field of a config, and of those in it."""
    for name, hint in get_type_hints(owner, include_extras=True).items():
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _flags_of(kind)
        else:
            own = next((mark.name for mark in marks if getattr(mark, "name", None)), None)
            yield name, f"--{own or name.replace('_', '-')}", kind


def _takes_several(kind: Any) -> bool:
    """Say whether an option of a type takes any number of values."""
    return get_origin(kind) in (tuple, list) or any(get_origin(one) in (tuple, list) for one in get_args(kind))


def _name_of(argument: Any) -> str:
    """Return what the user calls an argument of tyro's."""
    if argument.is_positional():
        return str(argument.field.intern_name).rpartition(".")[2].upper()
    return str(next(flag for flag in argument.lowered.name_or_flags if flag.startswith("--")))


def _kind_of(argument: Any) -> str:
    """Return what values an argument of tyro's takes."""
    several = re.fullmatch(r"\[(\S+) \[.*\]\]", shown := str(argument.lowered.metavar))
    kinds = sorted((several[1] if several else shown).split("|"), key="{None}".__eq__)
    return " or ".join(KINDS.get(kind, kind.strip("{}")) for kind in kinds) + (" each" if several else "")


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
