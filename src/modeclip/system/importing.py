"""Import a library without the modules that it imports at its start and uses only for some models.

``import open_clip`` imports timm, transformers and, by way of torchvision, the compiler of torch. A plain CLIP needs
none of them, and together they take longer than torch itself. While `without_loading` is open, ``import timm`` gives a
stand-in, and so does ``from timm import create_model``. A stand-in is looked up in the real module when it is first
called, asked for an attribute, or put to `isinstance`; whoever holds one later finds what the import would have given.

Price: nothing. ``benchmarks/start.py`` prints what is left of the import of open_clip.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Later(type):
    """A name of a module that has not been imported."""

    module: str

    def real(cls) -> Any:
        return getattr(import_module(cls.module), cls.__name__)

    def __call__(cls, *words: Any, **named: Any) -> Any:
        return cls.real()(*words, **named)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # asked of every class by Python itself
            raise AttributeError(name)
        return getattr(cls.real(), name)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.real())


class _Module(ModuleType):
    """A module that has not been imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(name, (), {"module": self.__name__})


@contextmanager
def without_loading(*modules: str) -> Iterator[None]:
    """Let imports of some modules give stand-ins; those that are loaded already, or not installed, stay as they are.

    Args:
        modules: Their full names, each whose names are imported: ``timm`` and ``timm.layers``.

    Examples:
        >>> with without_loading("colorsys"):
        ...     from colorsys import rgb_to_hsv
        >>> rgb_to_hsv(1.0, 0.0, 0.0)
        (0.0, 1.0, 1.0)
    """
    left = [name for name in modules if name not in sys.modules and find_spec(name.partition(".")[0])]
    stand_ins = {name: _Module(name) for name in left}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
