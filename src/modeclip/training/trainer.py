"""A catalog, a selection of its rows and a part of a schedule -> one trained CLIP.

The batch of step t is a pure function of (seed, t, rows), and so is what is random in the model; a job that was killed
continues from its last checkpoint with the batches that it would have seen, and ends with the same bits on the same
machine with the same number of threads and processes.

Under torchrun or Slurm the processes of a job share every batch and have one loss (``losses.py``); Lightning Fabric
reads their places from the environment. The batch goes through the towers in micro-batches where memory asks for it
(``gradients.py``). Both leave the gradient what it is.

Files of a job's folder: ``job.json`` (what to do), ``log.jsonl`` (a line every few steps), ``checkpoints/`` (weights,
optimizer state, step), ``done.json`` (written last), and the model itself as an open_clip folder.

Price: ``docs/cost.md`` states the rate on two cores.

Source: MoDE Sec. 3.3 and 4.2 and its released settings (AdamW, betas 0.9 and 0.98, decay 0.2 on matrices only,
logit scale at most ln 100).
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.checkpoints import Checkpoint, load_checkpoint, load_open_clip_train, save_checkpoint
from modeclip.models.clip import Clip, fast_attention, load_clip, save_clip
from modeclip.system.console import progress
from modeclip.system.devices import choose_precision, keep_freed_memory
from modeclip.system.files import only_process, write_atomically, writing
from modeclip.training.batches import DecodedSample, Feed, TrainingBatch, batch_rows, job_rows
from modeclip.training.distributed import World, leave_processes, place_like, whole
from modeclip.training.jobs import TrainConfig, TrainJob, TrainResult
from modeclip.training.journal import Journal
from modeclip.training.preflight import preflight

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric
    from torch import Tensor

MAX_LOGIT_SCALE = math.log(100)  # CLIP, Sec. 2.5
LOCK_PATIENCE_SECONDS = 30.0  # for a job whose parent was killed a moment ago
PARENT_VARIABLE = "MODECLIP_PARENT"  # process id of who started the job; the job stops when that process is gone
FAILED_BATCH_FILE = "failed-batch.json"
Visit = Callable[[Clip, int], bool]
"""Called with the model in evaluation mode and the step; True ends the job."""


def train(
    job: TrainJob, *, visit_every: int = 0, visit: Visit | None = None, kept: dict[int, DecodedSample] | None = None
) -> TrainResult:
    """Train one job to its end, continuing from its last checkpoint if it has one.

    Args:
        job: What to train.
        visit_every: Steps between two calls of ``visit``; 0: only after the last step.
        visit: May look at the model and end the job early.
        kept: For several jobs in one process, of the same catalog and tokenizer: what they keep of its rows, filled
            here, so that each row is read once. See ``train.engine.keep_pictures_gb``.

    Raises:
        ModeclipError: The job cannot work (too few rows, unknown model, loss not finite), or another process trains it.
    """
    import torch

    finished = TrainResult.read(job)
    if finished is not None:
        return finished
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    world = World.of_environment()
    if world.size > 1 and visit is not None:
        raise ModeclipError(
            f"{job.name}: a model is visited in training by one process only; start it without torchrun"
        )
    with only_process(folder, LOCK_PATIENCE_SECONDS) if world.rank == 0 else nullcontext():
        torch.set_num_threads(job.threads)
        keep_freed_memory()
        catalog = Catalog.open(job.catalog)
        rows = job_rows(job, catalog)
        preflight(job, catalog, rows, world.size)
        trainer = _Trainer(job, world, rows)
        trainer.run(visit_every, visit, kept)
        result = TrainResult(
            digest=job.digest,
            samples=(trainer.step - job.first_step) * job.config.batch_size,
            rows=len(rows),
            seconds=time.monotonic() - started,
        )
        model = trainer.whole_model()
        if world.rank == 0:
            save_clip(model, folder)
            write_atomically(folder / "done.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


@dataclass
class _Trainer:
    """State of a running job: model, optimizer and step."""

    job: TrainJob
    world: World
    rows: Int[np.ndarray, " N"]
    clip: Clip = field(init=False)
    fabric: Fabric = field(init=False)
    towers: Any = field(init=False)
    optimizer: Any = field(init=False)
    parameters: dict[str, torch.nn.Parameter] = field(init=False)
    step: int = field(init=False)
    micro_batch: int = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    """Losses of the steps since they were last looked at, on the device, so that no step waits for it."""
    stop: bool = False

    def __post_init__(self) -> None:
        from modeclip.training.gradients import Towers, make_optimizer

        config = self.job.config
        self.fabric = self.world.fabric(config.engine)
        start = self._start()
        self.clip = load_clip(
            config.model,
            seed=config.seed,
            patch_dropout=config.augment.patch_dropout,
            siglip=config.loss == "siglip",
        )
        if config.engine.grad_checkpointing:
            self.clip.model.set_grad_checkpointing()
        self.clip.model.train()
        self.towers = self.fabric.setup_module(Towers(self.clip))
        self.parameters = dict(self.clip.model.named_parameters())
        self.optimizer = self.fabric.setup_optimizers(make_optimizer(self.parameters, config))
        self.step = self.job.first_step
        micro_batch = config.engine.micro_batch
        self.micro_batch = 0 if micro_batch == "auto" else micro_batch or config.batch_size
        if start is None and self.job.start_from is not None:
            names = [(name, value.ndim) for name, value in self.parameters.items()]
            start = load_open_clip_train(Path(self.job.start_from), names)
        if start is not None:
            self._restore(start)

    def _start(self) -> Checkpoint | None:
        """Return the checkpoint of a job that this one continues: its own, or the one that it starts from."""
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

    def run(self, visit_every: int, visit: Visit | None, kept: dict[int, DecodedSample] | None) -> None:
        """Train from the present step to the job's last one."""
        import torch

        signal.signal(signal.SIGTERM, self._on_sigterm)
        job, config = self.job, self.job.config
        journal = None
        if self._first:
            journal = Journal(Path(job.folder), self.step, config.engine.report_to, job.name, asdict(job))
        feed = Feed(
            catalog=job.catalog,
            rows=torch.from_numpy(self.rows),
            config=config,
            tokenizer=self.clip.tokenizer,
            preprocess=self.clip.preprocess,
            image_size=self.clip.image_size,
            rank=self.world.rank,
            world_size=self.world.size,
            kept=kept,
        )
        saves = _Saves(config, len(self.rows))
        parent = os.environ.get(PARENT_VARIABLE)
        watched = self._first and parent is None  # who starts several jobs shows them side by side
        left = (job.last_step - self.step) * config.batch_size
        with (
            fast_attention(self.fabric.device, choose_precision(config.engine.precision)),
            progress(f"train {job.name}", left, "samples") if watched else nullcontext() as advance,
        ):
            for batch, waited in feed.batches(range(self.step, job.last_step)):
                looks = (self.step + 1) % config.engine.log_every == 0 or self.step + 1 == job.last_step
                norm = self._train_step(batch, looks)
                if journal:
                    journal.count(config.batch_size, waited)
                if advance:
                    advance(config.batch_size)
                if looks:
                    values = self._values(norm)
                    if journal:
                        journal.write(**values)
                # visited before it is saved: a killed job that continues misses no visit
                if visit and visit_every and self.step % visit_every == 0 and self.step < job.last_step:
                    self.clip.model.eval()
                    ended = visit(self.clip, self.step)
                    self.clip.model.train()
                    if ended:
                        break
                # one process decides at any step, several decide together when they look at the losses anyway
                if looks or self.world.size == 1:
                    self.stop |= bool(parent) and os.getppid() != int(parent or 0)
                    stop, save = self._agree(self.stop, saves.due(self.step))
                    if stop or save:
                        self._save()
                        saves.done(self.step)
                    if stop:
                        raise SystemExit(128 + signal.SIGTERM)
        if visit and self.step == job.last_step:
            self.clip.model.eval()
            visit(self.clip, self.step)
        if saves.last != self.step:
            self._save()
        if journal:
            journal.close()

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the weights only."""
        return self.world.size > 1 and self.job.config.engine.strategy == "fsdp"

    @property
    def _first(self) -> bool:
        return self.world.rank == 0

    def _train_step(self, batch: TrainingBatch, looks: bool) -> Tensor | None:
        """Take a step; return the norm of the gradient if it was asked for or limited."""
        import torch

        from modeclip.training.gradients import backward, find_micro_batch, finish_gradient

        config = self.job.config
        if self.micro_batch == 0:
            self.micro_batch = find_micro_batch(self.towers, self.fabric, batch, self.world.here)
        rate = self.job.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        seed = (config.seed, self.step, self.world.rank)
        try:
            loss = backward(self.towers, self.fabric, batch, self._loss, micro_batch=self.micro_batch, seed=seed)
        except torch.OutOfMemoryError as error:
            raise ModeclipError(
                f"{self.job.name}: {self.micro_batch:,} samples at once do not fit into the device's memory; set "
                f"train.engine.micro_batch to a part of it, or to auto"
            ) from error
        norm = finish_gradient(
            self.towers, self.fabric, self.optimizer, config.clip_grad_norm, sharded=self.sharded, looks=looks
        )
        self.optimizer.step()
        with torch.no_grad():
            self.parameters["logit_scale"].clamp_(0, MAX_LOGIT_SCALE)
        self.losses.append(loss)
        self.step += 1
        return norm

    def _loss(self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        from modeclip.training.losses import contrastive_loss, sigmoid_loss

        captions = ids if self.job.config.mask_same_captions else None
        if self.job.config.loss == "siglip":
            return sigmoid_loss(images, texts, scale, bias, captions)
        return contrastive_loss(images, texts, scale, captions)

    def _values(self, norm: Tensor | None) -> dict[str, int | float]:
        """Return what the log says of the present step, after a look at the losses since the last one."""
        loss = self._check_losses()
        scale = whole(self.parameters["logit_scale"].detach()).exp()
        return {
            "step": self.step,
            "samples": self.step * self.job.config.batch_size,
            "loss": round(loss, 6),
            "lr": self.job.learning_rate(self.step - 1),
            "logit_scale": round(float(scale), 4),
            "grad_norm": round(float(whole(norm)), 4) if norm is not None else math.nan,
            "memory_gb": round(self._memory_gb(), 3),
        }

    def _memory_gb(self) -> float:
        """Return the highest memory of this process so far: of its GPU, if it has one."""
        import torch

        if self.fabric.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.fabric.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _check_losses(self) -> float:
        """Return the last loss; raise if any since the last look was not finite, with the batch that it was of."""
        import torch

        losses = torch.stack(self.losses).flatten()
        if self.world.size > 1:
            losses = self.fabric.all_reduce(losses, reduce_op="sum")  # type: ignore[assignment]
        values = losses.tolist()
        self.losses = []
        for index, value in enumerate(values):
            if not math.isfinite(value):
                self._fail(self.step - len(values) + index, value)
        return float(values[-1])

    def _fail(self, step: int, loss: float) -> None:
        job, config = self.job, self.job.config
        rows = batch_rows(self.rows, step, config.batch_size, config.seed)
        keys = Catalog.open(job.catalog).read(["key"], rows)["key"].tolist()
        path = Path(job.folder) / FAILED_BATCH_FILE
        if self._first:
            write_atomically(path, json.dumps({"step": step, "loss": str(loss), "keys": keys}, indent=1) + "\n")
        raise ModeclipError(
            f"{job.name}: the loss is {loss} at step {step}; its batch begins with {', '.join(keys[:3])} (all keys in "
            f"{path}); lower train.learning_rate (now {config.learning_rate:g}), set train.clip_grad_norm, or set "
            f"train.engine.precision to 32-true"
        )

    def _agree(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Return what any of the processes wants."""
        if self.world.size == 1:
            return stop, save
        import torch

        wanted = torch.tensor([float(stop), float(save and self._first)], device=self.fabric.device)
        wanted = self.fabric.all_reduce(wanted, reduce_op="max")  # type: ignore[assignment]
        return bool(wanted[0]), bool(wanted[1])

    def whole_model(self) -> Clip:
        """Return the model with all of its weights in this process (every process must ask)."""
        if not self.sharded:
            return self.clip
        model = load_clip(self.job.config.model, siglip=self.job.config.loss == "siglip")
        model.model.load_state_dict({name: whole(value) for name, value in self.clip.model.state_dict().items()})
        return model

    def _save(self) -> None:
        if self.losses:
            self._check_losses()  # a model that is broken is not saved
        model = {name: whole(value) for name, value in self.clip.model.state_dict().items()}
        optimizer = {
            f"{key}.{name}": whole(value)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.optimizer.state[parameter].items()
        }
        if self._first:
            facts = {"micro_batch": self.micro_batch, "precision": self.fabric._precision.state_dict()}
            state = Checkpoint(step=self.step, digest=self.job.digest, model=model, optimizer=optimizer, facts=facts)
            save_checkpoint(Path(self.job.folder), state, self.job.config.engine.keep_checkpoints)
        self.fabric.barrier()

    def _restore(self, start: Checkpoint) -> None:
        """Continue from a checkpoint: of this job, or of the one before it."""
        own = self.clip.model.state_dict()
        self.clip.model.load_state_dict({name: place_like(own[name], value) for name, value in start.model.items()})
        for name, parameter in self.parameters.items():
            state = {key: start.optimizer[f"{key}.{name}"] for key in _STATE if f"{key}.{name}" in start.optimizer}
            if state:
                self.optimizer.optimizer.state[parameter] = {
                    key: value if key == "step" else place_like(parameter, value) for key, value in state.items()
                }
        if start.digest == self.job.digest:
            self.step = start.step
            self.micro_batch = int(start.facts.get("micro_batch", 0)) or self.micro_batch
        precision: Mapping[str, Any] = start.facts.get("precision") or {}
        if precision:
            self.fabric._precision.load_state_dict(dict(precision))

    def _on_sigterm(self, *_: object) -> None:
        self.stop = True


_STATE = ("step", "exp_avg", "exp_avg_sq")


class _Saves:
    """When the next checkpoint is due."""

    def __init__(self, config: TrainConfig, num_rows: int) -> None:
        number, unit = config.engine.save_interval()
        self._seconds = number if unit == "seconds" else math.inf
        a_pass = num_rows // config.batch_size
        self._steps = {"steps": int(number), "epochs": int(number) * a_pass}.get(unit, 0)
        self._saved_at = time.monotonic()
        self.last: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after this many steps."""
        if self._steps:
            return step // self._steps != (step - 1 if self.last is None else self.last) // self._steps
        return time.monotonic() - self._saved_at >= self._seconds

    def done(self, step: int) -> None:
        """Take note of a checkpoint."""
        self._saved_at, self.last = time.monotonic(), step


def main(path: str) -> None:
    """Train the job of a file; what ``launching.py`` starts as a process of its own, and torchrun as several."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which sends SIGTERM
    try:
        with writing(Path(path).parent):
            train(TrainJob.load(Path(path)))
        leave_processes()
    except ModeclipError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1])
