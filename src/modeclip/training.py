"""A catalog, a selection of its rows and a part of a schedule -> one trained CLIP.

The batch of step t is a pure function of (seed, t, rows): a
job that was killed continues from its last checkpoint with the batches that it would have seen, and ends with the same
bits on the same machine with the same number of threads.

Files of a job's folder: ``job.json`` (what to do), ``log.jsonl`` (a line every few steps), ``checkpoint.safetensors``
(weights, optimizer state, step), ``done.json`` (written last), and the model itself as an
open_clip folder.

Price: on two cores, the 1.8-million-parameter towers of ``modeclip-icon`` (6.3 million more in the token table) train
at the rate that ``docs/cost.md`` states. Rejected: workers that feed data by fork (Lance is not fork-safe); two
threads decode and tokenize ahead instead, which does not change any result.

Source: MoDE Sec. 3.3 and 4.2 and its released settings (AdamW, betas 0.9 and 0.98, decay 0.2 on matrices only,
logit scale at most ln 100); the loss is CLIP's (arXiv 2103.00020, Fig. 3).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.catalog import Catalog
from modeclip.clip import Clip, encode_image, encode_text, fast_attention, load_clip, random_crops, save_clip
from modeclip.errors import ModeclipError
from modeclip.files import only_process, write_atomically, writing
from modeclip.jobs import TrainConfig, TrainJob, TrainResult

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric

MAX_LOGIT_SCALE = math.log(100)  # CLIP, Sec. 2.5
LOG_EVERY_STEPS = 10
LOCK_PATIENCE_SECONDS = 30.0  # for a job whose parent was killed a moment ago
CROP_STREAM = 1 << 40  # keys of the random streams of crops start here, far from those of the orders of the rows
PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4
PARENT_VARIABLE = "MODECLIP_PARENT"  # process id of who started the job; the job stops when that process is gone


def batch_rows(rows: Int[np.ndarray, " N"], step: int, batch_size: int, seed: int) -> Int[np.ndarray, " B"]:
    """Return the rows of one step's batch: each pass over the rows is a new permutation, no row twice in a batch.

    A pure function of its arguments, so that a job can be resumed at any step. The rows left over at the end of a pass
    (fewer than a batch) wait for another pass's permutation.
    """
    batches_per_pass = len(rows) // batch_size
    passes, index = divmod(step, batches_per_pass)
    order = np.random.Generator(np.random.Philox(key=[seed, passes])).permutation(len(rows))
    return rows[order[index * batch_size : (index + 1) * batch_size]]


def contrastive_loss(
    image_features: Float[torch.Tensor, "B D"], text_features: Float[torch.Tensor, "B D"], logit_scale: torch.Tensor
) -> torch.Tensor:
    """Return CLIP's loss: cross-entropy of each image over the batch's captions, and of each caption over its images.

    Args:
        image_features: Unit vectors of the images.
        text_features: Unit vectors of their captions, in the same order.
        logit_scale: Factor on the cosines (already exponentiated).
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def job_rows(job: TrainJob, catalog: Catalog) -> Int[np.ndarray, " N"]:
    """Return the catalog rows that a job trains on, ascending."""
    rows = catalog.select(mask=job.mask, **job.where)
    if job.out_of_cluster_fraction > 0 and job.where:
        others = np.setdiff1d(catalog.select(mask=job.mask), rows)
        draw = np.random.Generator(np.random.Philox(key=[job.config.seed, 1_000_003 + sum(job.where.values())]))
        count = round(job.out_of_cluster_fraction * len(others))
        rows = np.sort(np.concatenate([rows, draw.choice(others, count, replace=False)]))
    if len(rows) < job.config.batch_size:
        raise ModeclipError(
            f"{job.name}: {len(rows):,} pairs are fewer than one batch of {job.config.batch_size:,}; "
            f"set train.batch_size to at most {len(rows):,}, or use fewer experts"
        )
    return rows


def train(job: TrainJob) -> TrainResult:
    """Train one job to its end, continuing from its last checkpoint if it has one.

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
    with only_process(folder, LOCK_PATIENCE_SECONDS):
        torch.set_num_threads(job.threads)
        catalog = Catalog.open(Path(job.catalog))
        rows = job_rows(job, catalog)
        trainer = _Trainer(job)
        trainer.run(catalog, rows)
        save_clip(trainer.clip, folder)
        result = TrainResult(
            digest=job.digest,
            samples=(job.last_step - job.first_step) * job.config.batch_size,
            rows=len(rows),
            seconds=time.monotonic() - started,
        )
        write_atomically(folder / "done.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


@dataclass
class _Trainer:
    """State of a running job: model, optimizer and step."""

    job: TrainJob
    clip: Clip = field(init=False)
    step: int = field(init=False)
    precision: str = field(init=False)
    fabric: Fabric = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    parameters: dict[str, torch.nn.Parameter] = field(init=False)
    stop: bool = False

    def __post_init__(self) -> None:
        from lightning_fabric import Fabric

        config = self.job.config
        self.precision = choose_precision(config.engine.precision)
        self.fabric = Fabric(accelerator="auto", devices=1, precision=self.precision)  # type: ignore[arg-type]
        self.clip = load_clip(config.model, seed=config.seed)
        self.fabric.to_device(self.clip.model)
        self.parameters = dict(self.clip.model.named_parameters())
        self.optimizer = _make_optimizer(self.parameters, config)
        self.step = self.job.first_step
        own = Path(self.job.folder) / "checkpoint.safetensors"
        if not self._restore(own, self.job.digest) and self.job.start_from is not None:
            start = Path(self.job.start_from) / "checkpoint.safetensors"
            if not self._restore(start, self.job.start_digest):
                raise ModeclipError(f"{self.job.name}: {start} is missing or of another run; train that model first")

    def run(self, catalog: Catalog, rows: Int[np.ndarray, " N"]) -> None:
        """Train from the present step to the job's last one."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        job, log = self.job, _Log(Path(self.job.folder) / "log.jsonl", self.step)
        parent, saved_at = os.environ.get(PARENT_VARIABLE), time.monotonic()
        device = self.fabric.device

        def load(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            batch = batch_rows(rows, step, job.config.batch_size, job.config.seed)
            captions = catalog.read(["caption"], batch)["caption"]
            pictures = catalog.images(batch)
            if job.config.augment.min_crop_share < 1:
                draw = np.random.Generator(np.random.Philox(key=[job.config.seed, CROP_STREAM + step]))
                pictures = random_crops(pictures, self.clip.image_size, job.config.augment.min_crop_share, draw)
            return self.clip.images(pictures), self.clip.tokens(captions.tolist())

        with fast_attention(device, self.precision):
            for (images, tokens), waited in _ahead(load, range(self.step, job.last_step)):
                loss = self._train_step(images.to(device), tokens.to(device))
                log.count(job.config.batch_size, waited)
                if self.step % LOG_EVERY_STEPS == 0 or self.step == job.last_step:
                    self._write_log(log, float(loss))
                if self.stop or (parent and os.getppid() != int(parent)):
                    self._save()
                    raise SystemExit(128 + signal.SIGTERM)
                if time.monotonic() - saved_at > job.config.engine.save_interval()[0]:
                    self._save()
                    saved_at = time.monotonic()
        self._save()

    def _train_step(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        import torch

        rate = self.job.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        model = self.clip.model
        with self.fabric.autocast():
            image_features, text_features = encode_image(model, images), encode_text(model, tokens)
        scale = self.parameters["logit_scale"]
        loss = contrastive_loss(image_features.float(), text_features.float(), scale.exp())
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self.optimizer.step()
        with torch.no_grad():
            scale.clamp_(0, MAX_LOGIT_SCALE)
        self.step += 1
        return loss.detach()

    def _write_log(self, log: _Log, loss: float) -> None:
        if not math.isfinite(loss):
            raise ModeclipError(
                f"{self.job.name}: the loss is {loss} at step {self.step}; lower train.learning_rate "
                f"(now {self.job.config.learning_rate:g}) or set train.engine.precision to 32-true"
            )
        batch_size = self.job.config.batch_size
        log.write(
            step=self.step,
            samples=self.step * batch_size,
            loss=round(loss, 6),
            lr=self.job.learning_rate(self.step - 1),
            logit_scale=round(float(self.parameters["logit_scale"].detach().exp()), 4),
        )

    def _save(self) -> None:
        from safetensors.torch import save_file

        tensors = {f"model.{name}": value.contiguous() for name, value in self.clip.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value.contiguous()
        path = Path(self.job.folder) / "checkpoint.safetensors"
        temporary = path.with_name(path.name + ".part")
        save_file(tensors, temporary, metadata={"step": str(self.step), "digest": self.job.digest})
        temporary.replace(path)

    def _restore(self, path: Path, digest: str) -> bool:
        """Load a checkpoint of the job with this digest; return False if there is none."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("digest") != digest:
                    return False
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except SafetensorError as error:
            raise ModeclipError(f"{self.job.name}: {path} is damaged ({error}); delete it and run again") from error
        prefix = "model."
        weights = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        self.clip.model.load_state_dict(weights)
        for name, parameter in self.parameters.items():
            state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
        self.step = int(metadata["step"])
        return True

    def _on_sigterm(self, *_: object) -> None:
        self.stop = True


class _Log:
    """The job's log file: cut back to the step that the job continues from, then a line every few steps."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= step else []
                except (json.JSONDecodeError, KeyError):
                    break  # the line that a kill cut short
        write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._path = path
        self._since, self._samples, self._waited = time.monotonic(), 0, 0.0

    def count(self, samples: int, waited: float) -> None:
        self._samples += samples
        self._waited += waited

    def write(self, **values: int | float) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = {
            "samples_per_second": round(self._samples / seconds, 1),
            "data_wait": round(self._waited / seconds, 4),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values | speed) + "\n")
        self._since, self._samples, self._waited = time.monotonic(), 0, 0.0


def choose_precision(wanted: str) -> str:
    """Return the precision to train in: ``auto`` is bf16 where the device multiplies it fast, else float32."""
    import torch

    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "bf16-mixed" if _has_amx() else "32-true"


def _has_amx() -> bool:
    """Whether the processor has bfloat16 matrix units; without them bf16 is slower than float32 on a CPU."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _make_optimizer(parameters: dict[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    import torch

    decayed = [value for value in parameters.values() if value.ndim >= 2]
    others = [value for value in parameters.values() if value.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def _ahead(
    load: Callable[[int], tuple[torch.Tensor, torch.Tensor]], steps: range
) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], float]]:
    """Yield each step's batch with the seconds that it was waited for; threads load the next few meanwhile."""
    with ThreadPoolExecutor(PREFETCH_THREADS) as pool:
        waiting: deque[Future[tuple[torch.Tensor, torch.Tensor]]] = deque()
        try:
            upcoming = iter(steps)
            for step in upcoming:
                waiting.append(pool.submit(load, step))
                if len(waiting) < PREFETCH_BATCHES:
                    continue
                yield _timed(waiting.popleft())
            while waiting:
                yield _timed(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()


def _timed(future: Future[tuple[torch.Tensor, torch.Tensor]]) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    started = time.monotonic()
    return future.result(), time.monotonic() - started


def main(path: str) -> None:
    """Train the job of a file; what ``experts.run_jobs`` starts as a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which sends SIGTERM
    try:
        with writing(Path(path).parent):
            train(TrainJob.load(Path(path)))
    except ModeclipError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1])
