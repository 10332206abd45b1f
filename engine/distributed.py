"""The processes of a run: started by torchrun or SLURM, through torch.distributed. One process needs none of it."""

import atexit
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import Sampler

from utils import InputError

# How long a process waits for the others, which may be in the middle of a long validation group.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, of which this one is number ``rank`` of ``size``. Only the first prints and writes."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, own: Any) -> list[Any]:
        """What every rank has, in the order of the ranks."""
        found = [own] * self.size
        if self.size > 1:
            distributed.all_gather_object(found, own)
        return found

    def from_first(self, own: Any) -> Any:
        """What the first rank has."""
        content = [own]
        if self.size > 1:
            distributed.broadcast_object_list(content, src=0, device=self.device)
        return content[0]

    def copy_from_first(self, network: nn.Module) -> None:
        """Give a network the weights and buffers that the first rank's has."""
        if self.size > 1:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, src=0)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor], *, weight: float = 1.0) -> None:
        """Replace floating-point tensors by their mean over the ranks, whose weights have the mean 1.

        In the backward pass of DistributedDataParallel, the others would wait for a rank that gives up a step.
        """
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors]) * weight
        distributed.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.div_(self.size).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


class Launch(NamedTuple):
    """What torchrun or srun says of this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    by_slurm: bool = False


def read_launch() -> Launch | None:
    """How this process was launched; None if it was started by itself. InputError if the variables make no sense.

    WORLD_SIZE tells of torchrun, a step of several tasks of srun. Without either, the other variables are left over from
    something else and are ignored, as empty ones are.
    """
    environ = {name: value for name, value in os.environ.items() if value.strip()}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    by_slurm = "WORLD_SIZE" not in environ
    if by_slurm:
        if environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
            return None
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        # "4(x2),3" is four tasks on each of two nodes and three on the last: at most four on this one.
        counts = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get(names[3], ""))
        environ[names[3]] = max(counts, key=int, default="")
    elif environ["WORLD_SIZE"] == "1" and not set(names) <= set(environ):  # not torchrun, which forwards signals
        return None
    numbers = [int(text) if re.fullmatch("[0-9]{1,6}", text := environ.get(name, "")) else -1 for name in names]
    rank, size, local_rank, local_size = numbers
    if min(numbers) < 0 or not (rank < size and local_rank < local_size <= size):
        found = ", ".join(f"{name}={os.environ[name]}" if environ.get(name) else f"no {name}" for name in names)
        advice = f"Start the processes with torchrun or srun, or unset {names[1]} to run a single one"
        raise InputError(f"the environment has {found}, which is not the state of a launched process. {advice}")
    return Launch(*numbers, by_slurm)


def join(launch: Launch, device: torch.device) -> Ranks:
    """Connect to the other processes of the run. InputError if the environment does not say where the first one is."""
    environ = os.environ
    if launch.by_slurm:
        job = int(re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "")) or 0)
        environ.setdefault("MASTER_PORT", str(20000 + job % 20000))
        if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
            environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = environ.get("MASTER_PORT", "")
    if not environ.get("MASTER_ADDR") or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        needed = "several processes need MASTER_ADDR, the host of the first, and MASTER_PORT in the environment"
        export = "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)"
        raise InputError(f"{needed}. torchrun sets them; for srun on several nodes: {export}")
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=COLLECTIVE_TIMEOUT)
    atexit.register(distributed.destroy_process_group)
    return Ranks(launch.rank, launch.size, launch.local_size, device)


class Shard(Sampler[list[Any]]):
    """This rank's part of the batches of an epoch, from the batch on that comes next.

    ``batches`` have ``len()``, ``[k]`` and ``set_epoch(epoch)``. With ``by_image``, a batch is divided among the ranks;
    otherwise each rank takes whole batches in turn.
    """

    def __init__(self, batches: Any, ranks: Ranks, *, by_image: bool) -> None:
        self.batches, self.ranks, self.by_image, self.first = batches, ranks, by_image, 0
        self.length = len(batches)  # over all ranks
        if by_image and len(batches[self.length - 1]) < ranks.size:
            self.length -= 1  # what is left over at the end of an epoch has no image for every rank

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch, and the batch in it to begin with."""
        self.batches.set_epoch(epoch)
        self.first = first

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[Any]]:
        rank, size = self.ranks.rank, self.ranks.size
        if self.by_image:
            return (self.batches[k][rank::size] for k in range(self.first, self.length))
        return (self.batches[k] for k in range(self.first + rank, self.length, size))
