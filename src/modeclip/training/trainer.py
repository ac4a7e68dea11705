"""Train one CLIP: a job's rows, seen for its part of the schedule, become a model.

A step takes the batch of the schedule's step, the loss and its gradient over all processes, and one step of AdamW at
the schedule's learning rate. What is minimised is the objective's matter (`modeclip.training.objectives`), how the
gradient is found within the memory that there is belongs to `modeclip.training.gradients`.

The batch of step t is a pure function of (seed, t, rows), and so is what is random in the model. A job that was killed
therefore continues from its last checkpoint with the batches that it would have seen. On the same machine, with the
same number of threads and processes, it ends with the same bits.

Under torchrun or Slurm the processes of a job share every batch and have one loss. Lightning Fabric reads their places
from the environment.

A job's folder holds ``job.json`` (what to do), ``log.jsonl`` (a line every few steps), ``checkpoints/`` (weights,
optimizer state, step), ``done.json`` (written last), and the model itself as an open_clip folder.

Price: ``docs/cost.md`` states the rate on two cores.

Source: MoDE Sec. 3.3 and 4.2 and its released settings (AdamW with betas 0.9 and 0.98, decay 0.2 on matrices only,
logit scale at most 100).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.blocks import freeze
from modeclip.models.checkpoints import (
    MOMENTS,
    Checkpoint,
    checkpoint_files,
    drop_damaged,
    load_checkpoint,
    load_open_clip_train,
    save_checkpoint,
)
from modeclip.models.clip import Clip, fast_attention, load_clip, save_clip
from modeclip.system.console import progress
from modeclip.system.devices import choose_precision, keep_freed_memory
from modeclip.system.files import note_files, only_process, write_json, writing
from modeclip.system.processes import PARENT_VARIABLE, end_with_parent
from modeclip.training.batches import DecodedSample, Feed, Order, job_rows, read_groups, read_probability
from modeclip.training.distributed import World, leave_processes, place_like, whole
from modeclip.training.jobs import (
    DONE_FILE,
    ERRORS_FILE,
    JOB_FILE,
    TrainJob,
    TrainResult,
    check_free,
    prepare,
    remove_damage,
)
from modeclip.training.journal import Journal
from modeclip.training.objectives import make_objective
from modeclip.training.preflight import preflight
from modeclip.training.trunk_outputs import TrunkOutputs, complete, forget, measure_outputs, open_outputs

if TYPE_CHECKING:
    from torch import Tensor

    from modeclip.training.gradients import Towers
    from modeclip.training.objectives.objective import TrainingBatch

LOCK_PATIENCE_SECONDS = 30.0
"""How long to wait for another process in the folder. Whoever runs several jobs waits until that one has ended."""
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Environment variable that torchrun sets for the processes that it starts."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a training to end, where they are not ignored: SIGINT is Ctrl-C, SIGHUP a closed terminal."""
FAILED_BATCH_FILE = "failed-batch.json"
"""File of a job's folder that names the pairs of the batch whose loss was not finite."""
Visit = Callable[[Clip, int], bool]
"""Called with the model in evaluation mode and the step; True ends the job."""


def train(
    job: TrainJob,
    *,
    resume: str | None = None,
    visit_every: int = 0,
    visit: Visit | None = None,
    kept: dict[int, DecodedSample] | None = None,
) -> TrainResult:
    """Train a job to its end, from its last checkpoint if it has one.

    Args:
        job: What to train.
        resume: Make the folder fit for the job in this way (`prepare`), and write the job's file, once no other
            process is at work there. None: both is done.
        visit_every: Steps between two calls of ``visit``. 0 calls it after the last step only.
        visit: Looks at the model while it trains and may end the job early.
        kept: Samples that several jobs of one process share, by row, if their catalog and tokenizer are the same. It
            is filled here, so that each row is read once; see ``train.engine.keep_pictures_gb``.

    Raises:
        ModeclipError: The job cannot work (too few rows, unknown model, loss not finite), another process trains it, or
            with ``resume`` the folder holds another job.
    """
    import torch

    finished = None if resume == "never" else TrainResult.read(job)
    if finished is not None:
        return finished
    if resume is not None:
        check_free(job)
    folder, started = Path(job.folder), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    world = World.of_environment()
    if TORCHRUN_VARIABLE in os.environ:  # so that no rank waits for others when torchrun itself was killed
        end_with_parent(os.getppid())
    if world.size > 1 and visit is not None:
        raise ModeclipError(
            f"{job.name}: only one process can visit a model while it trains; start it without torchrun"
        )
    patience = math.inf if PARENT_VARIABLE in os.environ else LOCK_PATIENCE_SECONDS
    with only_process(folder, patience) if world.is_first else nullcontext():
        if resume is not None:
            prepare(job, resume)
            job.save()
        finished = TrainResult.read(job) if world.size == 1 else None
        if finished is not None:  # by the process that this one has waited for
            return finished
        if world.is_first:
            remove_damage(job)
            drop_damaged(folder)
        torch.set_num_threads(job.threads)
        keep_freed_memory()
        catalog = Catalog.open(job.catalog)
        rows = job_rows(job, catalog)
        preflight(job, catalog, rows, world.size)
        probability, groups = (read(job.config, catalog, rows) for read in (read_probability, read_groups))
        learner = _Learner(job, world, rows, probability, groups)
        _follow_schedule(learner, visit_every, visit, kept)
        result = TrainResult(
            digest=job.digest,
            samples=(learner.step - job.first_step) * job.config.batch_size,
            rows=len(rows),
            seconds=time.monotonic() - started,
        )
        model = learner.whole_model()
        if world.is_first:
            save_clip(model, folder)
            result = replace(result, files=note_files(folder, [*_model_files(folder), *checkpoint_files(folder)]))
            write_json(folder / DONE_FILE, asdict(result), indent=2)
            forget(folder)
    return result


def _model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that loading its model reads, and the record of the comparison with open_clip."""
    kinds = {".json", ".safetensors", ".model", ".txt"}  # .txt: vocab.txt and merges.txt of a tokenizer
    others = {JOB_FILE, DONE_FILE, FAILED_BATCH_FILE, ERRORS_FILE, "output.txt"}
    return sorted(path for path in folder.iterdir() if path.suffix in kinds and path.name not in others)


def _follow_schedule(
    learner: _Learner, visit_every: int, visit: Visit | None, kept: dict[int, DecodedSample] | None
) -> None:
    """Take the steps from the learner's present one to the job's last one, with a log, checkpoints and visits."""
    job, config, world = learner.job, learner.job.config, learner.world
    has_bar = (
        world.is_first and PARENT_VARIABLE not in os.environ
    )  # who starts several jobs shows all of them side by side
    journal = None
    if world.is_first:
        journal = Journal(Path(job.folder), learner.step, config.engine.report_to, job.name, asdict(job))
    left = (job.last_step - learner.step) * config.batch_size
    with (
        fast_attention(learner.fabric.device, choose_precision(config.engine.precision)),
        progress(f"train {job.name}", left, "samples") if has_bar else nullcontext() as advance,
        _Pauses(learner) as pauses,
    ):
        steps = range(learner.step, job.last_step)
        for batch, waited in learner.feed(kept).batches(steps, learner.trunk[1] if learner.trunk else None):
            looks = (learner.step + 1) % config.engine.log_every == 0 or learner.step + 1 == job.last_step
            learner.take_step(batch, with_norm=looks)
            if journal:
                journal.count(config.batch_size, waited)
            if advance:
                advance(config.batch_size)
            if looks:
                values = learner.look()
                if journal:
                    journal.write(**values)
            # visited before it is saved, so that a killed job that continues misses no visit
            is_visited = visit_every and learner.step % visit_every == 0 and learner.step < job.last_step
            if visit and is_visited and learner.show(visit):
                break
            # one process decides at any step, several decide together when they look at the losses anyway
            if looks or world.size == 1:
                pauses.take()
        if visit and learner.step == job.last_step:
            learner.show(visit)
        pauses.save()
    if journal:
        journal.close()


class _Learner:
    """The model that a job trains, its optimizer, and the step that both have reached."""

    def __init__(
        self,
        job: TrainJob,
        world: World,
        rows: Int[np.ndarray, " N"],
        probability: Float[np.ndarray, " N"] | None,
        groups: Int[np.ndarray, " N"] | None,
    ) -> None:
        """Build the model and bring it to where the job, or the job before it, has left off."""
        from modeclip.training.gradients import Towers, make_optimizer

        config = job.config
        self.job, self.world, self.rows = job, world, rows
        self.probability, self.groups = probability, groups
        self.objective = make_objective(config)
        self.fabric = world.fabric(config.engine)
        start = self._start()
        self.clip = load_clip(
            config.model,
            seed=config.seed,
            patch_dropout=config.augment.patch_dropout,
            logit_start=self.objective.logit_start,
        )
        if config.engine.grad_checkpointing:
            self.clip.model.set_grad_checkpointing()
        freeze(self.clip.model, config.trainable)
        self.clip.model.train()
        weights = {"balance_loss": config.balance_loss, "router_z_loss": config.router_z_loss}
        towers = Towers(self.clip, **weights, depth=config.depth)
        self.towers: Any = self.fabric.setup_module(towers)
        self.parameters = {name: value for name, value in self.clip.model.named_parameters() if value.requires_grad}
        self.optimizer: Any = self.fabric.setup_optimizers(make_optimizer(self.parameters, config))
        self.objective.open(self.fabric.device, Catalog.open(job.catalog))
        self.step = job.first_step
        wanted = config.engine.micro_batch
        self.micro_batch = 0 if wanted == "auto" else wanted or config.batch_size  # 0: found at the first step
        self._losses: list[Tensor] = []  # since the last look, on the device, so that no step waits for its loss
        self._norm: Tensor | None = None
        self._routing: Tensor | None = None
        if start is None and job.start_from is not None:
            names = [(name, value.ndim) for name, value in self.clip.model.named_parameters()]
            start = load_open_clip_train(Path(job.start_from), names)
        if start is not None:
            self._restore(start)
        self.trunk = None if config.depth is None else self._open_trunk(towers)

    def _open_trunk(self, towers: Towers) -> tuple[TrunkOutputs, Callable[[TrainingBatch], TrainingBatch]]:
        """Return what the trunk has given for pairs so far, and what makes it for those of a batch.

        Raises:
            ModeclipError: There are several machines, or weights in parts, or too little disk.
        """
        import torch

        job, world = self.job, self.world
        if self.is_sharded or world.here < world.size:
            what = "strategy fsdp" if self.is_sharded else f"{world.size // world.here} machines"
            raise ModeclipError(
                f"{job.name}: train.engine.keep_trunk needs processes of one machine with the whole model, got {what}; "
                "leave it out, or take ddp on one machine"
            )

        def run(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), self.fabric.autocast():
                states = towers.run_trunks(pixels.to(self.fabric.device), tokens.to(self.fabric.device))
            return states[0].cpu(), states[1].cpu()

        kept, needed = measure_outputs(job, Catalog.open(job.catalog), self.rows, self.clip, run)
        if world.is_first:
            open_outputs(job, kept, needed)
        self.fabric.barrier()
        return kept, lambda batch: complete(batch, kept, run)

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of the weights only."""
        return self.world.size > 1 and self.job.config.engine.strategy == "fsdp"

    def feed(self, kept: dict[int, DecodedSample] | None) -> Feed:
        """Return what makes this process's part of each batch."""
        import torch

        return Feed(
            catalog=self.job.catalog,
            rows=torch.from_numpy(self.rows),
            probability=None if self.probability is None else torch.from_numpy(self.probability),
            groups=None if self.groups is None else torch.from_numpy(self.groups),
            config=self.job.config,
            tokenizer=self.clip.tokenizer,
            preprocess=self.clip.preprocess,
            image_size=self.clip.image_size,
            columns=(*self.objective.columns, *self.objective.vector_columns),
            caption_ids=self.objective.uses_caption_ids,
            rank=self.world.rank,
            world_size=self.world.size,
            kept=kept,
            trunk=self.trunk[0] if self.trunk else None,
        )

    def take_step(self, batch: TrainingBatch, *, with_norm: bool) -> None:
        """Take a step; the norm of the gradient is kept if it is asked for or limited."""
        import torch

        from modeclip.training.gradients import backward, find_micro_batch, finish_gradient

        config = self.job.config
        if self.micro_batch == 0:
            self.micro_batch = find_micro_batch(self.towers, self.fabric, batch, self.world.here)
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        seed = (config.seed, self.step, self.world.rank)
        try:
            loss, self._routing = backward(
                self.towers, self.fabric, batch, self.objective, micro_batch=self.micro_batch, seed=seed
            )
        except torch.OutOfMemoryError as error:
            raise ModeclipError(
                f"{self.job.name}: {self.micro_batch:,} samples at once do not fit into the device's memory; set "
                "train.engine.micro_batch to a smaller number, or to auto"
            ) from error
        self._norm = finish_gradient(
            self.towers,
            self.fabric,
            self.optimizer,
            config.clip_grad_norm,
            sharded=self.is_sharded,
            with_norm=with_norm,
        )
        self.optimizer.step()
        with torch.no_grad():
            if self.clip.model.logit_scale.requires_grad:
                self.objective.limit(self.clip.model)
        self._losses.append(loss)
        self.step += 1

    def look(self) -> dict[str, int | float]:
        """Return what the log says of the present step.

        Raises:
            ModeclipError: A loss since the last look was not finite.
        """
        loss = self._check_losses()
        return {
            "step": self.step,
            "samples": self.step * self.job.config.batch_size,
            "loss": round(loss, 6),
            "lr": self.job.learning_rate(self.step - 1),
            **self.objective.values(self.clip.model),
            **_routers(self._routing),
            "grad_norm": round(float(whole(self._norm)), 4) if self._norm is not None else math.nan,
            "memory_gb": round(self._memory_gb(), 3),
        }

    def show(self, visit: Visit) -> bool:
        """Show the model in evaluation mode; return whether the visit ends the job."""
        self.clip.model.eval()
        is_over = visit(self.clip, self.step)
        self.clip.model.train()
        return is_over

    def whole_model(self) -> Clip:
        """Return the model with all of its weights in this process; every process must ask."""
        if not self.is_sharded:
            return self.clip
        model = load_clip(self.job.config.model, seed=0, logit_start=self.objective.logit_start)
        model.model.load_state_dict({name: whole(value) for name, value in self.clip.model.state_dict().items()})
        return model

    def save(self) -> None:
        """Write a checkpoint; every process must ask.

        Raises:
            ModeclipError: A loss since the last look was not finite: a broken model is not saved.
        """
        if self._losses:
            self._check_losses()
        model = {name: whole(value) for name, value in self.clip.model.state_dict().items()}
        optimizer = {
            f"{key}.{name}": whole(value)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.optimizer.state[parameter].items()
        }
        if self.world.is_first:
            facts: dict[str, Any] = {"precision": self.fabric._precision.state_dict()}
            if self.job.config.engine.micro_batch == "auto":
                facts["found_micro_batch"] = self.micro_batch
            state = Checkpoint(step=self.step, digest=self.job.digest, model=model, optimizer=optimizer, facts=facts)
            save_checkpoint(Path(self.job.folder), state, self.job.config.engine.keep_checkpoints)
        self.fabric.barrier()

    def _start(self) -> Checkpoint | None:
        """Return the job's own checkpoint, else that of the job which it continues, if there is either."""
        job = self.job
        own = load_checkpoint(Path(job.folder), job.digest)
        if own is not None or job.start_from is None or Path(job.start_from).is_file():
            return own
        start = load_checkpoint(Path(job.start_from), job.start_digest or None)
        if start is None:
            raise ModeclipError(
                f"{job.name}: {job.start_from} has no checkpoint of the job to start from; train that model first"
            )
        return start

    def _restore(self, start: Checkpoint) -> None:
        """Continue from a checkpoint of this job, or of the one before it."""
        own = self.clip.model.state_dict()
        self.clip.model.load_state_dict({name: place_like(own[name], value) for name, value in start.model.items()})
        for name, parameter in self.parameters.items():
            found = {key: start.optimizer.get(f"{key}.{name}") for key in ("step", *MOMENTS)}
            state = {key: value for key, value in found.items() if value is not None}
            if state:
                self.optimizer.optimizer.state[parameter] = {
                    key: value if key == "step" else place_like(parameter, value) for key, value in state.items()
                }
        if start.digest == self.job.digest:
            self.step = start.step
            if self.job.config.engine.micro_batch == "auto":
                self.micro_batch = int(start.facts.get("found_micro_batch", 0))
        precision: Mapping[str, Any] = start.facts.get("precision") or {}
        if precision:
            self.fabric._precision.load_state_dict(dict(precision))

    def _check_losses(self) -> float:
        """Return the last loss; raise if any since the last look was not finite, naming its batch."""
        import torch

        losses = torch.stack(self._losses).flatten()
        if self.world.size > 1:
            losses = self.fabric.all_reduce(losses, reduce_op="sum")  # type: ignore[assignment]
        values = losses.tolist()
        self._losses = []
        for index, value in enumerate(values):
            if not math.isfinite(value):
                self._fail(self.step - len(values) + index, value)
        return float(values[-1])

    def _fail(self, step: int, loss: float) -> None:
        job, config = self.job, self.job.config
        rows = Order(self.rows, config.batch_size, config.seed, self.probability, self.groups).batch(step)
        keys = Catalog.open(job.catalog).read(["key"], rows)["key"].tolist()
        path = Path(job.folder) / FAILED_BATCH_FILE
        if self.world.is_first:
            write_json(path, {"step": step, "loss": str(loss), "keys": keys})
        raise ModeclipError(
            f"{job.name}: the loss is {loss} at step {step}; its batch begins with {', '.join(keys[:3])} (all keys: "
            f"{path}); lower train.learning_rate (now {config.highest_rate:g}), set train.clip_grad_norm, or set "
            "train.engine.precision to 32-true"
        )

    def _memory_gb(self) -> float:
        """Return the highest memory of this process so far: its GPU's if it has one."""
        import torch

        if self.fabric.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.fabric.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _routers(sums: Tensor | None) -> dict[str, float]:
    """Return what the log says of the routers of a CLIP-MoE: their losses in the last batch, without weights."""
    from modeclip.models.moe import router_losses

    if sums is None or not sums.numel():
        return {}
    balance, z = (float(value) for value in router_losses(sums))
    return {"balance": round(balance, 4), "router_z": round(z, 4)}


def save_interval(job_seconds: float, save_seconds: float) -> float:
    """Return the seconds between two checkpoints where ``train.engine.save_every`` is ``auto``.

    Args:
        job_seconds: What the whole job takes, by the steps so far.
        save_seconds: What the last checkpoint took.

    Examples:
        A job of a minute, of an hour, of a week, and of an hour with checkpoints that take 10 s:

        >>> [save_interval(*times) for times in ((60.0, 0.1), (3600.0, 0.1), (604_800.0, 5.0), (3600.0, 10.0))]
        [20.0, 72.0, 1800.0, 200.0]
    """
    return max(min(max(job_seconds / 50, 20.0), 1800.0), 20.0 * save_seconds)


class _Pauses:
    """Saves the learner when a checkpoint is due, and before it ends the job where one of `ENDING` asks for that.

    A second Ctrl-C does what it does without a training, for whoever does not want to wait for the checkpoint.
    """

    def __init__(self, learner: _Learner) -> None:
        number, unit = learner.job.config.engine.save_interval()
        pairs = len(learner.rows) if learner.probability is None else round(float(learner.probability.sum()))
        steps_per_pass = max(1, pairs // learner.job.config.batch_size)
        self._learner = learner
        self._seconds = number if unit == "seconds" else math.inf
        self._steps = {"steps": int(number), "epochs": int(number) * steps_per_pass}.get(unit, 0)
        self._is_auto, self._save_seconds = unit == "auto", 0.0
        self._begun_at, self._first_step = time.monotonic(), learner.step
        self._saved_at = self._begun_at
        self._saved_step: int | None = None
        self._asked = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Pauses:
        if threading.current_thread() is threading.main_thread():  # no other may take signals
            for number in ENDING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: it is not Python's to take
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def take(self) -> None:
        """Save if it is time to, and leave if one of the processes was asked to end, by which signal tells how."""
        ending, must_save = self._agree(self._asked, self._is_due())
        if ending or must_save:
            self.save()
        if ending == signal.SIGINT:
            raise KeyboardInterrupt
        if ending:
            raise SystemExit(128 + ending)

    def save(self) -> None:
        """Save the present step, unless it is saved."""
        if self._saved_step != self._learner.step:
            began = time.monotonic()
            self._learner.save()
            self._saved_at, self._saved_step = time.monotonic(), self._learner.step
            self._save_seconds = self._saved_at - began

    def _is_due(self) -> bool:
        now, job = time.monotonic(), self._learner.job
        if self._is_auto:
            each = (now - self._begun_at) / max(1, self._learner.step - self._first_step)
            return now - self._saved_at >= save_interval(each * (job.last_step - job.first_step), self._save_seconds)
        if not self._steps:
            return now - self._saved_at >= self._seconds
        before = self._first_step if self._saved_step is None else self._saved_step
        return self._learner.step // self._steps != before // self._steps

    def _agree(self, asked: int, must_save: bool) -> tuple[int, bool]:
        """Return the highest signal of all processes, 0 for none; of saving, what the first wants: clocks differ."""
        learner = self._learner
        if learner.world.size == 1:
            return asked, must_save
        import torch

        own = [float(asked), float(must_save and learner.world.is_first)]
        found: Any = learner.fabric.all_reduce(torch.tensor(own, device=learner.fabric.device), reduce_op="max")
        return int(found[0]), bool(found[1])

    def _on_signal(self, number: int, _: object) -> None:
        self._asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])


def main(path: str) -> None:
    """Train the job of a file, in a process of its own or in one of several that torchrun has started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which sends SIGTERM
    multiprocessing.set_forkserver_preload(["open_clip", "modeclip.training.batches"])  # once for all loader processes
    try:
        with writing(Path(path).parent):
            train(TrainJob.load(Path(path)))
        leave_processes()
    except ModeclipError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1])
