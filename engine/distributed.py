"""The processes of a run: started by torchrun or SLURM, through torch.distributed. One process needs none of it."""

import atexit
import os
import subprocess
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import Sampler

from engine.start import choose_device, gpu_numbers
from utils import InputError

# How long a process waits for the others, who may be in the middle of a long validation group.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Ranks:
    """The processes of a run, of which this one is number ``rank`` of ``size``. Only the first prints and writes."""

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self.device = device or torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """A row of numbers of the same length from every rank, in the order of the ranks."""
        if self.size == 1:
            return [list(row)]
        own = torch.tensor(row, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(rows, own)
        return torch.stack(rows).tolist()

    def gather_objects(self, own: Any) -> list[Any]:
        """Anything that can be pickled from every rank, in the order of the ranks."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, own)
        return found

    def from_first(self, own: Any) -> Any:
        """What the first rank has."""
        if self.size == 1:
            return own
        content = [own]
        distributed.broadcast_object_list(content, src=0, device=self.device)
        return content[0]

    def copy_from_first(self, network: nn.Module) -> None:
        """Give a network the weights and buffers that the first rank's has."""
        if self.size > 1:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, src=0)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their mean over the ranks: gradients, running statistics.

        Not by DistributedDataParallel, which exchanges gradients during the backward pass: a step that one rank gives up
        would leave the others waiting for it.
        """
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.div_(self.size).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def start(gpu: str | None) -> tuple[Ranks, torch.device, list[int]]:
    """Join the other processes of the run, if there are any; choose the device.

    Returns:
        The ranks, this process's device, and the CUDA ids that DataParallel spreads over (one process only).

    Raises:
        InputError: a ``-gpu`` that does not go with the number of processes on this machine.
    """
    _launched_by_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        device, ids = choose_device(gpu)
        return Ranks(device=device), device, ids
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    ids = gpu_numbers(gpu)
    if ids:
        # srun can show each task a GPU of its own, which is then the only one that it sees.
        is_bound = gpu is None and len(ids) == 1 and "SLURM_STEP_NUM_TASKS" in os.environ
        if len(ids) < local_size and not is_bound:
            raise InputError(
                f"expected a GPU for each of the {local_size} processes on this machine; got {len(ids)}. Start fewer "
                "(torchrun --nproc_per_node), name more with -gpu, or give -gpu cpu"
            )
        ids = [ids[0 if is_bound else local_rank]]
    device, _ = choose_device(",".join(map(str, ids)) or "cpu")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    atexit.register(distributed.destroy_process_group)
    return Ranks(rank, size, local_size, device), device, []


def _launched_by_slurm() -> None:
    """Where torchrun's variables are missing and srun has started several tasks, say the same in torchrun's words."""
    environ = os.environ
    if "WORLD_SIZE" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    counts = [  # "4(x2),3" is four tasks on each of two nodes and three on the last
        count
        for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(",")
        for count in [part.split("(x")[0]] * int(part.partition("(x")[2].rstrip(")") or 1)
    ]
    environ["LOCAL_WORLD_SIZE"] = counts[int(environ["SLURM_NODEID"])]
    if "MASTER_ADDR" not in environ:  # the host of rank 0
        hosts = ["127.0.0.1"]
        if len(counts) > 1:
            command = ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]]
            hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        environ["MASTER_ADDR"] = hosts[0]
    environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000))


class Shard(Sampler[list[Any]]):
    """This rank's part of the batches of an epoch, from the batch on that comes next.

    Args:
        batches: has ``len()``, ``[k]`` and ``set_epoch(epoch)``.
        by_image: a batch is divided among the ranks; otherwise each rank takes whole batches in turn.
    """

    def __init__(self, batches: Any, ranks: Ranks, *, by_image: bool) -> None:
        self.batches, self.ranks, self.by_image = batches, ranks, by_image
        self.first = 0
        self.length = len(batches)
        if by_image and len(batches[self.length - 1]) < ranks.size:
            self.length -= 1  # what is left over at the end of an epoch has no image for every rank

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch, and the batch in it to begin with."""
        self.batches.set_epoch(epoch)
        self.first = first

    def __len__(self) -> int:
        """Batches of an epoch over all ranks."""
        return self.length

    def __iter__(self) -> Iterator[list[Any]]:
        rank, size = self.ranks.rank, self.ranks.size
        if self.by_image:
            return (self.batches[k][rank::size] for k in range(self.first, self.length))
        return (self.batches[k] for k in range(self.first + rank, self.length, size))
