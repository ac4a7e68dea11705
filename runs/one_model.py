"""Which way from many models to one is worth what it costs? Every way on the built-in icons, with ablations of DMU.

Usage: python runs/one_model.py [--plan runs/one_model.yaml] [--out runs/one_model] [--seeds 0 1 2] [--only NAME...]
       python runs/one_model.py --table      prints the tables from the records alone
       python runs/one_model.py --times      times the images of all models again, on a machine that does nothing else

`runs/one_model.yaml` says which models there are. All of them start from one base model of their seed, and are put to
the held-out icon sets (zero-shot) and to a search among one icon of each held-out name, by text and by image. A model
is a line of JSON in `runs/one_model.jsonl`; what is there is not measured again, and a command that was killed goes on
from the last checkpoint. Stages that several models have in common are trained once.

What a model cost counts everything that it needs from random weights on: samples (each as often as it was seen),
floating-point operations (forward and backward as the parameters that train need them, and the passes that embed the
pairs or run a teacher), and the seconds of the trainings. An image costs the towers that it goes through: those of all
experts in a mixture. Milliseconds are measured in turn with the base, and the table shows the ratio.

Models train one after the other on all cores. A seed takes about 30 minutes on two of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measure import machine
from one_model_report import BASE, read_lines, tables
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeclip import Catalog, cluster, embed, evaluate, index, merge, open_systems
from modeclip.adapting.distilling import DistillConfig, distill
from modeclip.adapting.merging import MergeConfig
from modeclip.adapting.upcycling import UpcycleConfig, upcycle
from modeclip.clustering.embedding import EmbedConfig
from modeclip.clustering.fitting import ClusterConfig
from modeclip.data.tasks.task import Task, catalog_retrieval, catalog_tasks
from modeclip.evaluation.evaluate import EvaluateConfig
from modeclip.mixture.bundle import RoutingConfig, load_bundle
from modeclip.models.blocks import freeze
from modeclip.models.clip import Clip, computing, encode_image, encode_text, load_clip, save_clip
from modeclip.models.flops import count_flops
from modeclip.models.moe import count_parameters
from modeclip.pipeline.recipe import parse_recipe
from modeclip.pipeline.run_folder import RunFolder, single_job
from modeclip.system.console import log
from modeclip.system.files import write_atomically
from modeclip.system.paths import RunPaths
from modeclip.training.experts import ExpertsConfig
from modeclip.training.jobs import TrainConfig, TrainJob, TrainResult
from modeclip.training.trainer import train

HERE = Path(__file__).parent
RETRIEVAL = "held-out names"
STAGE_FIELDS = ("num_clusters", "min_pairs", "epochs", "batch_size", "learning_rate", "weight_decay", "warmup_steps")
"""Settings that decide a stage, beside those that all cells have in common."""
TIMED_IMAGES, TIMED_ROUNDS = 256, 7

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What some work took."""

    samples: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            samples=self.samples + other.samples,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model that is there, or a mixture."""

    spec: Path
    """Folder of the model or of the bundle."""
    cost: Cost
    """What was needed beside the base."""
    members: Sequence[Path] = field(default_factory=tuple)
    """Models that a mixture, a soup or a CLIP-MoE was made of, the base not among them."""
    is_mixture: bool = False


class Experiment:
    """The plan, and the data that all seeds share."""

    def __init__(self, plan: Path, out: Path) -> None:
        self.plan = yaml.safe_load(plan.read_text(encoding="utf-8"))
        self.data = parse_recipe({"name": "one-model", "data": self.plan["data"]}).data
        self.out = out.resolve()
        self.cells: dict[str, Values] = self.plan["models"] | self.plan["ablations"]

    def prepare(self) -> None:
        """Index the pairs and the held-out sets, unless they are there."""
        if not all((path / "_versions").is_dir() for path in (self.shared.catalog_path, self.shared.tasks_path)):
            index(self.data, str(self.shared.folder))

    @property
    def shared(self) -> RunPaths:
        """The folder of the pairs and the held-out sets."""
        return RunPaths(folder=self.out / "data")

    @cached_property
    def tasks(self) -> list[Task]:
        """The held-out sets, and the search among one icon of each of their names."""
        catalog = Catalog.open(self.shared.tasks_path)
        _, first = np.unique(catalog.read(["caption"])["caption"].astype(str), return_index=True)
        return [*catalog_tasks(catalog), catalog_retrieval(catalog, np.sort(first), RETRIEVAL)]


class Bench:
    """The models of one seed."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self.experiment, self.plan, self.seed = experiment, experiment.plan, seed
        self.folder = experiment.out / f"seed-{seed}"
        self.make = cache(self._make)

    @cached_property
    def catalog(self) -> Catalog:
        """The seed's own copy of the pairs, since clusters and vectors become columns of it."""
        path = self.folder / "catalog.lance"
        if not path.exists():
            part = path.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self.experiment.shared.catalog_path, part)
            part.rename(path)
        return Catalog.open(path)

    @cached_property
    def caption_length(self) -> int:
        """Tokens that a batch is cut to, the mean over batches."""
        tokens = load_clip(self.plan["base"]["model"], seed=0).tokens(self.catalog.captions()).numpy()
        lengths = np.random.default_rng(0).permutation((tokens != 0).sum(1))
        size = self.plan["base"]["batch_size"]
        return round(float(np.mean([lengths[start : start + size].max() for start in range(0, len(lengths), size)])))

    @property
    def pass_samples(self) -> int:
        """Samples that ``epochs`` passes are, in whole batches and two equal parts."""
        step = 2 * self.plan["continued"]["batch_size"]
        return max(1, self.plan["epochs"] * len(self.catalog) // step) * step

    # ---------------------------------------------------------------- models

    def _make(self, name: str) -> Made:
        """Return a model, made if it is missing, and all that it is made of."""
        cell = dict(self.experiment.cells[name])
        made: Made = getattr(self, f"_{cell.pop('kind')}")(self._folder_of(name), **cell)
        return made

    def _folder_of(self, name: str) -> Path:
        return self.folder / "cells" / name.replace(",", "").replace(" ", "-")

    def _base(self, folder: Path) -> Made:
        cost = self._train(folder.with_name("base-training"), TrainConfig(**self._settings("base")))
        if not folder.exists():  # by itself: a folder with its job would be continued, optimizer state included
            part = folder.with_suffix(".part")
            save_clip(load_clip(folder.with_name("base-training")), part)
            part.rename(folder)
        return Made(spec=folder, cost=cost)

    def _dense(self, folder: Path, **given: Any) -> Made:
        samples = self.make(given["as"]).cost.samples
        return Made(spec=folder, cost=self._train(folder, self._continued(samples)))

    def _total(self, folder: Path, **given: Any) -> Made:
        config = TrainConfig(**self._settings("base"))
        flops = (self.make(given["as"]).cost + self.make(BASE).cost).flops
        per_sample = self._training_flops(config.model, "all")
        cost = self._train(folder, replace(config, samples=_round(flops / per_sample, config)))
        base = self.make(BASE).cost
        return Made(spec=folder, cost=cost + Cost(samples=-base.samples, flops=-base.flops, seconds=-base.seconds))

    def _mixture(self, _: Path) -> Made:
        settings = self.plan["mixture"]
        embed(self.catalog, EmbedConfig(encoder=settings["encoder"]))
        sizes = {"num_fine": settings["num_fine"], "num_experts": settings["num_experts"]}
        paths = RunPaths(folder=self.folder)
        if not paths.clusters.exists() or "expert" not in self.catalog.columns:
            cluster(self.catalog, ClusterConfig(**sizes, seed=self.seed)).save(paths.clusters)
        base = self.make(BASE).spec
        # Half of the schedule comes after a start that is given. So each expert sees as many samples as a stage.
        run = RunFolder(
            folder=self.folder,
            training=replace(self._continued(2 * self.pass_samples), trainable="ffn"),
            experts=ExpertsConfig(
                start=str(base), dense=False, dense_total=False, jobs=1, threads_per_job=torch.get_num_threads()
            ),
            routing=RoutingConfig(rule=settings["rule"]),
        )
        run.train(run.jobs)
        run.refresh_bundle()
        cost = sum((self._cost_of(job, "ffn") for job in run.jobs), Cost())
        return Made(spec=run.bundle, cost=cost, members=[Path(job.folder) for job in run.jobs], is_mixture=True)

    def _upcycle(self, folder: Path, of: str = BASE, **changes: Any) -> Made:
        source, config = self.make(of), self._upcycling(**changes)
        stages = source.spec == self.make(BASE).spec and config.experts == "stages"
        if stages:
            self._share_stages(folder, config)
        result = upcycle(source.spec, self.catalog, config, out=folder)
        cost = Cost() if of == BASE else source.cost
        base = self.make(BASE).spec
        for training in result.trainings:
            if training.name == "model":
                trains, model = ("all" if config.experts == "copies" else "routers"), Path(result.folder)
            else:
                trains, model = "ffn", base
                cost += self._forward(base, len(self.catalog))  # the pass that the stage is clustered by
            flops = training.samples * self._training_flops(str(model), trains)
            cost += Cost(samples=training.samples, flops=flops, seconds=training.seconds)
        return Made(
            spec=Path(result.folder),
            cost=cost,
            members=[folder / stage.name for stage in result.stages] or source.members,
        )

    def _soup(self, folder: Path, of: str) -> Made:
        source = self.make(of)
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            merge(list(source.members), MergeConfig(), out=part)
            part.rename(folder)
        cost = source.cost
        if not source.is_mixture:  # the stages alone, without the routers
            result = json.loads((source.spec.parent / "upcycling.json").read_text(encoding="utf-8"))
            routers = next(one for one in result["trainings"] if one["name"] == "model")
            flops = routers["samples"] * self._training_flops(str(source.spec), "routers")
            cost += Cost(samples=-routers["samples"], flops=-flops, seconds=-routers["seconds"])
        return Made(spec=folder, cost=cost)

    def _distill(self, folder: Path, of: str, **given: Any) -> Made:
        teacher, base, common = self.make(of), self.make(BASE).spec, self._settings("continued")
        samples = _round(self.make(given["as"]).cost.samples, self._continued(self.pass_samples))
        common.pop("label_smoothing", None)
        config = DistillConfig(
            **common,
            loss=self.plan["distilled"]["loss"],
            samples=samples,
            warmup_fraction=self._warmup(samples),
            threads=torch.get_num_threads(),
        )
        result = distill(teacher.spec, self.catalog, config, student=str(base), out=folder)
        cost = teacher.cost
        for model in teacher.members if teacher.is_mixture else [teacher.spec]:
            cost += self._forward(model, len(self.catalog))
        flops = result.samples * self._training_flops(str(base), "all")
        return Made(spec=folder, cost=cost + Cost(samples=result.samples, flops=flops, seconds=result.seconds))

    def _share_stages(self, folder: Path, config: UpcycleConfig) -> None:
        """Copy stages that another model has trained in the same way; `upcycle` compares their settings once more."""
        for name, cell in self.experiment.cells.items():
            others = {key: value for key, value in cell.items() if key != "kind"}
            if cell["kind"] != "upcycle" or "of" in others or others.get("experts") == "copies":
                continue
            other = self._upcycling(**others)
            source = self._folder_of(name)
            if source == folder or any(getattr(config, key) != getattr(other, key) for key in STAGE_FIELDS):
                continue
            shared = min(config.stages, other.stages) if config.each_from == other.each_from else 1
            for number in range(1, shared + 1):
                stage, target = source / f"stage-{number}", folder / f"stage-{number}"
                if (stage / "done.json").is_file() and not target.exists():
                    part = folder / f"stage-{number}.part"
                    shutil.rmtree(part, ignore_errors=True)
                    shutil.copytree(stage, part)
                    part.rename(target)

    # ---------------------------------------------------------------- settings and costs

    def _settings(self, section: str) -> Values:
        """Return a section of the plan as fields of a training."""
        recipe = parse_recipe({"name": "one-model", "data": self.plan["data"], "train": self.plan[section]})
        return {key: getattr(recipe.train, key) for key in self.plan[section]} | {"seed": self.seed}

    def _continued(self, samples: int) -> TrainConfig:
        """Return the training of the base on so many samples, a schedule of two equal parts."""
        config = TrainConfig(
            **self._settings("continued"), model=str(self.make(BASE).spec), total_parts=2, seed_parts=1
        )
        samples = _round(samples, config)
        return replace(config, samples=samples, warmup_fraction=self._warmup(samples))

    def _warmup(self, samples: int) -> float:
        steps = samples / self.plan["continued"]["batch_size"]
        return float(min(self.plan["warmup_steps"] / steps, 0.5))

    def _upcycling(self, **changes: Any) -> UpcycleConfig:
        common = self._settings("continued") | {
            "epochs": self.plan["epochs"],
            "warmup_steps": self.plan["warmup_steps"],
            "router_learning_rate": self.plan["router_learning_rate"],
            "threads": torch.get_num_threads(),
        }
        return UpcycleConfig(**common | changes)

    def _train(self, folder: Path, config: TrainConfig) -> Cost:
        job = single_job(self.catalog, folder, config, threads=torch.get_num_threads())
        if TrainResult.read(job) is None:
            job.save()
            train(job)
        return self._cost_of(job, "all")

    def _cost_of(self, job: TrainJob, trainable: str) -> Cost:
        result = TrainResult.read(job)
        assert result is not None, job.folder
        flops = result.samples * self._training_flops(job.config.model, trainable)
        return Cost(samples=result.samples, flops=flops, seconds=result.seconds)

    def _forward(self, model: Path, samples: int) -> Cost:
        return Cost(flops=samples * count_flops(model, self.caption_length).forward)

    def _training_flops(self, spec: str, trainable: str) -> float:
        return training_flops(spec, trainable, self.caption_length)

    # ---------------------------------------------------------------- measuring

    def measure(self, name: str) -> Values:
        """Make a model and return its scores and costs."""
        made = self.make(name)
        cost = made.cost + (Cost() if name == BASE else self.make(BASE).cost)
        config = EvaluateConfig(templates=("{}",))
        results = evaluate(open_systems([str(made.spec)]), self.experiment.tasks, config)
        found = {result.task.name: result.outcome for result in results}
        members = [Path(path) for path in made.members] if made.is_mixture else [made.spec]
        return {
            "tasks": {task: 100 * outcome.score for task, outcome in found.items() if task != RETRIEVAL},
            "retrieval": {key: 100 * value for key, value in found[RETRIEVAL].metrics.items()},
            **asdict(cost),
            "inference_flops": sum(count_flops(member, self.caption_length).image for member in members),
            **time_images(members, self.make(BASE).spec),
            **self._parameters(made),
        }

    def _parameters(self, made: Made) -> dict[str, int]:
        """Return how many different numbers a model or a mixture has, and how many of them an image and a text meet."""
        if not made.is_mixture:
            total, active = count_parameters(load_clip(made.spec).model)
            return {"parameters": total, "active_parameters": active}
        distinct: dict[str, list[torch.Tensor]] = {}
        for ref in load_bundle(made.spec).models:
            for name, value in load_clip(ref.spec).model.named_parameters():
                known = distinct.setdefault(name, [])
                if not any(torch.equal(value, other) for other in known):
                    known.append(value.detach())
        total = sum(value.numel() for values in distinct.values() for value in values)
        return {"parameters": total, "active_parameters": total}


def _round(samples: float, config: TrainConfig) -> int:
    """Return whole batches for each part of a schedule."""
    step = config.batch_size * config.total_parts
    return max(1, round(samples / step)) * step


@cache
def training_flops(spec: str, trainable: str, caption_length: int) -> float:
    """Return the operations of a training sample, forward and backward, where only some parameters train."""
    clip = load_clip(spec, seed=0)
    freeze(clip.model, trainable)
    tokens = torch.zeros_like(clip.tokens([""]))
    tokens[:, :caption_length] = 1
    width, height = clip.image_size
    clip.model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image = encode_image(clip.model, torch.zeros(1, 3, height, width))
        (image * encode_text(clip.model, tokens)).sum().backward()
    return float(counter.get_total_flops())


def time_images(members: Sequence[Path], base: Path) -> dict[str, float]:
    """Return the milliseconds that an image takes in all members, and how many times the base's that is."""
    draw = np.random.default_rng(0)
    clips = [load_clip(base), *(load_clip(member) for member in members)]
    width, height = clips[0].image_size
    images = torch.from_numpy(draw.normal(size=(TIMED_IMAGES, 3, height, width)).astype(np.float32))

    def once(some: Sequence[Clip]) -> float:
        start = time.perf_counter()
        for clip in some:
            with computing(clip, "32-true"):
                encode_image(clip.model, images)
        return 1000 * (time.perf_counter() - start) / TIMED_IMAGES

    for clip in clips:
        clip.model.eval()
    once(clips)
    rounds = np.array([(once(clips[:1]), once(clips[1:])) for _ in range(TIMED_ROUNDS)])
    return {
        "ms_per_image": round(float(np.median(rounds[:, 1])), 4),
        "times_base": round(float(np.median(rounds[:, 1] / rounds[:, 0])), 3),
    }


def time_again(experiment: Experiment, records: Path) -> None:
    """Replace the milliseconds of all records by new ones, without training anything."""
    lines = read_lines(records)
    for line in lines:
        bench = Bench(experiment, line["seed"])
        made = bench.make(line["cell"])
        members = [Path(path) for path in made.members] if made.is_mixture else [made.spec]
        line["values"] |= time_images(members, bench.make(BASE).spec)
    write_atomically(records, "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Make and measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=HERE / "one_model.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/one_model"))
    parser.add_argument("--records", type=Path, default=HERE / "one_model.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--only", nargs="+", default=None, help="names of models")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--times", action="store_true", help="time all images again; leave the machine alone then")
    given = parser.parse_args()
    experiment = Experiment(given.plan, given.out)
    if wrong := set(given.only or ()) - experiment.cells.keys():
        parser.error(f"no model {min(wrong)!r} in {given.plan}; there are {', '.join(experiment.cells)}")
    if given.times:
        time_again(experiment, given.records)
    elif not given.table:
        experiment.prepare()
        done = {(line["cell"], line["seed"]) for line in read_lines(given.records)}
        for seed in given.seeds or experiment.plan["seeds"]:
            bench = Bench(experiment, seed)
            for cell in given.only or experiment.cells:
                if (cell, seed) in done:
                    continue
                values = bench.measure(cell)
                with given.records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"cell": cell, "seed": seed, "values": values} | machine()) + "\n")
                log(f"seed {seed}, {cell}: {np.mean(list(values['tasks'].values())):.1f} %")
    print(tables(read_lines(given.records), experiment.plan))


if __name__ == "__main__":
    main()
