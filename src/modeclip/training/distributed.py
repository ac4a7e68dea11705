"""Processes that train one job together, as torchrun or Slurm has started them, and what each of them holds.

Lightning Fabric sets up devices, precision and communication. With ``ddp`` every process has the whole model; with
``fsdp`` it has a part of each weight (PyTorch's ``fully_shard``), on GPUs and, for tests, on CPUs.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modeclip.errors import ModeclipError
from modeclip.system.devices import choose_precision
from modeclip.training.jobs import EngineConfig

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric
    from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train one job together, as torchrun or Slurm has started them."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Number of processes."""
    here: int = 1
    """Number of processes on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    @classmethod
    def of_environment(cls) -> World:
        """Return what the launcher's environment says of this process and the others."""
        get = os.environ.get
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            size = int(os.environ["WORLD_SIZE"])
            return cls(int(os.environ["RANK"]), size, int(get("LOCAL_WORLD_SIZE", size)))
        if "SLURM_PROCID" in os.environ and get("SLURM_JOB_NAME") not in {"bash", "interactive"}:
            size = int(get("SLURM_NTASKS", "1"))
            return cls(int(os.environ["SLURM_PROCID"]), size, size // int(get("SLURM_NNODES", "1")))
        return cls()

    def fabric(self, config: EngineConfig) -> Fabric:
        """Return Lightning Fabric for these processes, launched.

        Raises:
            ModeclipError: What the launcher has set does not fit together.
        """
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        strategy: Any = "auto"
        if self.size > 1:
            sharded = config.strategy == "fsdp"
            strategy = ModelParallelStrategy(shard, self.size, 1) if sharded else DDPStrategy()
        precision: Any = choose_precision(config.precision)
        try:
            fabric = Fabric(
                accelerator="auto",
                devices=self.here,
                num_nodes=self.size // self.here,
                strategy=strategy,
                precision=precision,
            )
        except (RuntimeError, ValueError) as error:
            raise ModeclipError(f"processes that train together: {' '.join(str(error).split())}") from error
        fabric.launch()
        return fabric


def shard(towers: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    """Split a model over the processes with FSDP2: each block of its transformers by itself, then the rest."""
    import torch
    from torch.distributed.fsdp import fully_shard

    data = mesh["data_parallel"]
    within: set[torch.nn.Module] = set()  # of blocks that are split, such as the list of a CLIP-MoE's experts
    for module in towers.modules():
        if isinstance(module, torch.nn.ModuleList) and module not in within:
            for block in module:
                fully_shard(block, mesh=data)
                within.update(block.modules())
    numbers = {
        value for value in towers.parameters() if value.ndim == 0
    }  # such as the logit scale; every process has them
    fully_shard(towers, mesh=data, ignored_params=numbers)
    return towers


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor: one that is split over the processes is put together on the CPU."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def place_like(target: Tensor, value: Tensor) -> Tensor:
    """Return a tensor on the device of another one, and split over the processes in the same way."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)


def leave_processes() -> None:
    """Leave the other processes in good order; gloo sometimes aborts a process that simply ends."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
