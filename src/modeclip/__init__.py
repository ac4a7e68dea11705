"""modeclip: train, route and use CLIP data experts (MoDE).

Data
    index      makes a `Catalog` of image-caption pairs from a source that `DataConfig` describes
    check      says what a catalog holds and what is wrong with it
Curation
    curate     decides by a method which pairs are trained on: metaclip, align, dfn, klite, duplicates
    Selection  says which pairs of a catalog a stage works on
Clusters
    embed      turns captions, or images, into vectors (`EmbedConfig`)
    cluster    splits a catalog into experts (`ClusterConfig`)
    kmeans     clusters any vectors, with a bound on the clusters' sizes
Models
    run        does the whole method of a `Recipe`, which `load_recipe` reads, in one folder
    RunFolder  plans, trains and bundles the models of such a folder
    finetune   adapts a model to a small set without losing what it could
    merge      averages the weights of models
Mixtures
    MoDE       is a bundle of experts, asked for one task at a time
    route      weighs the experts for a task's class embeddings
    assign     finds the clusters of new pairs, and what is new among them
    extend     continues an expert on new pairs, or adds one
Evaluation
    open_systems  names what answers: models, bundles, experts
    evaluate      puts tasks to them and says how well each did

A mistake of the user is a `ModeclipError`. Names are loaded when they are first used, so importing modeclip is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeclip.adapting.finetuning import finetune
    from modeclip.adapting.merging import merge
    from modeclip.clustering.embedding import EmbedConfig, embed
    from modeclip.clustering.fitting import ClusterConfig, cluster
    from modeclip.clustering.kmeans import kmeans
    from modeclip.curation.curating import curate
    from modeclip.data.catalog import Catalog
    from modeclip.data.checks import check
    from modeclip.data.indexing import index
    from modeclip.data.selection import Selection
    from modeclip.data.sources.options import DataConfig
    from modeclip.errors import ModeclipError
    from modeclip.evaluation.evaluate import evaluate
    from modeclip.evaluation.systems import open_systems
    from modeclip.mixture.assigning import assign
    from modeclip.mixture.extending import extend
    from modeclip.mixture.mode import MoDE
    from modeclip.mixture.rules import route
    from modeclip.pages.run_report import write_report
    from modeclip.pipeline.recipe import Recipe, load_recipe
    from modeclip.pipeline.run_folder import RunFolder
    from modeclip.pipeline.stages import run

__version__ = "0.1.0"
__all__ = [
    "Catalog",
    "ClusterConfig",
    "DataConfig",
    "EmbedConfig",
    "MoDE",
    "ModeclipError",
    "Recipe",
    "RunFolder",
    "Selection",
    "assign",
    "check",
    "cluster",
    "curate",
    "embed",
    "evaluate",
    "extend",
    "finetune",
    "index",
    "kmeans",
    "load_recipe",
    "merge",
    "open_systems",
    "route",
    "run",
    "write_report",
]
_HOMES = {
    "Catalog": "data.catalog",
    "ClusterConfig": "clustering.fitting",
    "DataConfig": "data.sources.options",
    "EmbedConfig": "clustering.embedding",
    "MoDE": "mixture.mode",
    "ModeclipError": "errors",
    "Recipe": "pipeline.recipe",
    "RunFolder": "pipeline.run_folder",
    "Selection": "data.selection",
    "assign": "mixture.assigning",
    "check": "data.checks",
    "cluster": "clustering.fitting",
    "curate": "curation.curating",
    "embed": "clustering.embedding",
    "evaluate": "evaluation.evaluate",
    "extend": "mixture.extending",
    "finetune": "adapting.finetuning",
    "index": "data.indexing",
    "kmeans": "clustering.kmeans",
    "load_recipe": "pipeline.recipe",
    "merge": "adapting.merging",
    "open_systems": "evaluation.systems",
    "route": "mixture.rules",
    "run": "pipeline.stages",
    "write_report": "pages.run_report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"modeclip.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'modeclip' has no attribute {name!r}")
