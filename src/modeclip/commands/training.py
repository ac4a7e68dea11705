"""The commands that train models and show how far they are: train, train-experts, status."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import RoutingConfig
from modeclip.system.console import console, log, print_json, print_lines, print_table
from modeclip.system.options import AsJson, Mask, UserEncoder, Where
from modeclip.training.experts import ExpertsConfig
from modeclip.training.jobs import TrainConfig, TrainJob, TrainResult

RunPath = Positional[Annotated[Path, arg(help="Folder of a run, with catalog.lance and clusters/.")]]
RESUME = "latest: go on from this folder's own checkpoint; never: train anew"
OUT = Path("model")
WITHOUT_DENSE = ExpertsConfig(dense=False, dense_total=False)
"""The experts alone: the command trains the dense models, which belong to a recipe, only on request."""


def train(
    source: Positional[
        Annotated[str, arg(help="A catalog, or the job.json of a model, which holds all its settings.")]
    ],
    training: OmitArgPrefixes[TrainConfig],
    out: Annotated[Path, arg(help="Folder of the model.")] = OUT,
    where: Where = (),
    mask: Mask = None,
    resume: Annotated[
        str, arg(help=f"{RESUME}; a finished job's folder or a .pt of open_clip_train: continue that one.")
    ] = "latest",
    threads: Annotated[int, arg(help="Threads that compute.")] = 1,
    *,
    as_json: AsJson = False,
) -> None:
    """Train one model on a catalog or a part of it; several processes share the work under torchrun or Slurm."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.pipeline.run_folder import single_job
    from modeclip.training.trainer import train as train_job

    way: str | None = None
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if source.endswith(".json"):
        if (training, out, where, mask, resume, threads) != (TrainConfig(), OUT, (), None, "latest", 1):
            raise ModeclipError(
                f"train: {source} holds all settings of its model; give it without options, or give a catalog"
            )
        job = TrainJob.load(Path(source))
    else:
        if resume == "never" and os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) != "1":
            raise ModeclipError(
                f"train: --resume never works with one process only, since several would remove each other's files;"
                f" remove {out} by hand"
            )
        start = None if resume in {"latest", "never"} else resume
        job = single_job(
            Catalog.open(source),
            out,
            training,
            selection=Selection(where=where, mask=mask),
            start=_check_start(start),
            threads=threads,
        )
        way = "never" if resume == "never" else "latest"
    result = train_job(job, resume=way if is_first else None)  # the others wait for it when they meet
    if not is_first:
        return
    if as_json:
        print_json(asdict(result) | {"folder": job.folder})
    else:
        print_lines(f"{job.folder}: {result.samples:,} samples of {result.rows:,} pairs in {result.seconds:.0f} s")


def train_experts(
    run: RunPath,
    training: OmitArgPrefixes[TrainConfig],
    experts: OmitArgPrefixes[ExpertsConfig] = WITHOUT_DENSE,
    where: Where = (),
    mask: Mask = None,
    resume: Annotated[
        str, arg(help=f"{RESUME}; stale: train anew what no longer fits its pairs or settings.")
    ] = "latest",
    *,
    encoder: UserEncoder = None,
    routing: Annotated[OmitArgPrefixes[RoutingConfig], arg(name="bundle")],
    plan: Annotated[bool, arg(help="Say what the training costs, and stop.")] = False,
    commands: Annotated[
        bool,
        arg(
            help="Make the folder ready, as --resume says, and print a command for each model, for any machine that "
            "sees the folder."
        ),
    ] = False,
    ray: Annotated[
        bool, arg(help="Train on the Ray cluster of RAY_ADDRESS, or one that runs here, or a new one.")
    ] = False,
    stop_on_failure: Annotated[bool, arg(help="Stop the training of all models when one fails.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the experts of a clustered catalog that are missing, after saying what that costs."""
    from modeclip.data.selection import Selection
    from modeclip.pipeline.run_folder import RunFolder
    from modeclip.training.jobs import prepare
    from modeclip.training.launching import commands_for

    if resume not in {"latest", "stale", "never"}:
        raise ModeclipError(
            f"train-experts: --resume is latest, stale or never, got {resume!r}; --start names a trained seed"
        )
    folder = RunFolder(
        folder=run.resolve(),
        training=training,
        experts=experts,
        routing=routing,
        encoder=encoder,
        selection=Selection(where=where, mask=mask),
    )
    if not experts.for_classes:
        folder.add_controls()
    jobs = folder.jobs_for_classes(experts.for_classes, experts.nearest) if experts.for_classes else folder.jobs
    folder.reuse_models(jobs)
    if not (plan and resume != "latest"):
        for job in jobs:
            prepare(job, resume)
    missing = [job for job in jobs if TrainResult.read(job) is None]
    if commands:
        lines = commands_for(missing, experts.processes_per_job)
        print_json(lines) if as_json else print_lines(*lines)
        return
    content = _plan(missing, folder.catalog, experts, quiet=as_json, stop=plan)
    if plan:
        print_json(content) if as_json else None
        return
    folder.train(jobs, ray=ray, stop_on_failure=stop_on_failure, bundle=True)
    bundle = folder.refresh_bundle()
    if as_json:
        print_json({"plan": content, "models": [job.folder for job in jobs], "bundle": bundle and str(bundle)})
        return
    for job in jobs:
        print_lines(f"{job.name}: {job.folder}")
    print_lines(f"bundle: {bundle}" if bundle else "no bundle yet: no expert is trained")


def status(
    folder: Positional[Annotated[Path, arg(help="Folder of a run, of its models, or of one model.")]],
    *,
    watch: Annotated[bool, arg(help="Keep the table up to date until all have ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far the models of a run are, from any machine that sees the folder, also while they train."""
    from modeclip.training import status as board

    title = f"models of {folder}"
    rows = board.watch(lambda: board.status(folder), title) if watch else board.status(folder)
    if as_json:
        print_json([asdict(row) for row in rows])
    elif not (watch and console.is_terminal):  # where it was shown live, it is there already
        print_table(title, board.COLUMNS, [row.cells() for row in rows])


def _plan(
    jobs: Sequence[TrainJob], catalog: Any, config: ExpertsConfig, *, quiet: bool, stop: bool
) -> dict[str, Any] | None:
    """Print what the missing models cost and return it for machines; None if none is missing."""
    from modeclip.training.costs import COLUMNS, plan

    if not jobs:
        log("nothing to train: all models are done")
        return None
    found = plan(jobs, catalog, workers=config.jobs, processes=config.processes_per_job)
    if not quiet:
        print_table(f"plan: {len(jobs)} models, {config.jobs} at a time", COLUMNS, found.rows())
    if found.problem and stop:
        log(found.problem)
    elif found.problem:
        raise ModeclipError(found.problem)
    return found.to_json()


def _check_start(start: str | None) -> str | None:
    """Refuse a start that is no checkpoint; the name of a model is given by --model."""
    if start is None or start.endswith(".pt") or (Path(start) / "job.json").is_file():
        return start
    raise ModeclipError(
        f"--resume {start}: expected latest, never, the folder of a finished job, or a .pt of open_clip_train; "
        "a pretrained model to start from is named by --model"
    )
