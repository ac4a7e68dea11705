"""modeclip: train, route and use CLIP data experts (MoDE).

    Catalog    image-caption pairs, a row each
    MoDE       a bundle of experts, asked for one task at a time
    kmeans     clusters vectors, with a bound on the clusters' sizes
    route      weighs the experts for a task's class embeddings
    load_recipe, run    a recipe -> the whole method in one folder

Names are loaded at their first use, so importing modeclip is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeclip.clustering.kmeans import kmeans
    from modeclip.data.catalog import Catalog
    from modeclip.errors import ModeclipError
    from modeclip.mixture.mode import MoDE
    from modeclip.mixture.rules import route
    from modeclip.pages.run_report import write_report
    from modeclip.pipeline import Recipe, load_recipe, run

__version__ = "0.1.0"
_HOMES = {
    "Catalog": "data.catalog",
    "MoDE": "mixture.mode",
    "ModeclipError": "errors",
    "Recipe": "pipeline",
    "kmeans": "clustering.kmeans",
    "load_recipe": "pipeline",
    "route": "mixture.rules",
    "run": "pipeline",
    "write_report": "pages.run_report",
}
__all__ = ["Catalog", "MoDE", "ModeclipError", "Recipe", "kmeans", "load_recipe", "route", "run", "write_report"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"modeclip.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'modeclip' has no attribute {name!r}")
