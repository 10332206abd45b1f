"""The start of every script: processes, device, seed."""

import argparse
import os
import re

import numpy as np
import torch

import utils
from engine.distributed import Launch, Ranks, join, read_launch
from utils import InputError, status


def start(args: argparse.Namespace, *, one_process: bool = False) -> tuple[Ranks, torch.device, list[int]]:
    """Join the other processes of the run, if there are any, choose the device, and seed everything.

    A ``seed`` of 0 is replaced by a drawn one, the same on every rank. ``one_process`` is for scripts that ignore a launcher.
    Returns the ranks, this process's device, and the CUDA ids that DataParallel spreads over (one process only). InputError
    for a ``-gpu`` that this machine does not have, fewer GPUs than processes, or senseless launcher variables.
    """
    launch = (None if one_process else read_launch()) or Launch(0, 1, 0, 1)
    utils.process.rank, utils.process.size, utils.process.local_size = launch.rank, launch.size, launch.local_size
    if launch.size == 1:
        device, device_ids = choose_device(args.gpu)
        ranks = Ranks(device=device)
    else:
        device, device_ids = _device_of_rank(args.gpu, launch), []
        ranks = join(launch, device)
    args.seed = ranks.from_first(choose_seed(args.seed))
    set_seed(args.seed, deterministic=args.deterministic)
    return ranks, device, device_ids


def _device_of_rank(gpu: str | None, launch: Launch) -> torch.device:
    ids = gpu_numbers(gpu)
    if not ids:
        return choose_device("cpu")[0]
    # srun can show each task a GPU of its own, which is then the only one that it sees.
    is_bound = launch.by_slurm and gpu is None and len(ids) == 1
    if len(ids) < launch.local_size and not is_bound:
        needed = f"{launch.local_size} processes on this machine need as many GPUs; there are {len(ids)} to use"
        advice = "Start fewer processes (torchrun --nproc_per_node), name more GPUs with -gpu, or use -gpu cpu"
        raise InputError(f"{needed}. {advice}")
    return choose_device(str(ids[0 if is_bound else launch.local_rank]))[0]


def choose_seed(seed: int) -> int:
    """The seed itself, or a drawn one for 0, which is printed."""
    if not seed:
        seed = int.from_bytes(os.urandom(4), "big") or 1
        status(f"seed: {seed}")
    return seed


def set_seed(seed: int, *, deterministic: bool = False) -> None:
    """Seed everything; ``deterministic`` takes deterministic kernels on a GPU, instead of the fastest ones."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that draw from numpy's global generator


def gpu_numbers(gpu: str | None) -> list[int]:
    """The CUDA ids that ``-gpu`` names, or all there are; none for the CPU. InputError for one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        return list(range(count))
    if gpu.strip().lower() == "cpu":
        return []
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", gpu.strip()):
        raise InputError(f'-gpu {gpu} is neither GPU numbers joined by commas, as in 0,1, nor "cpu"')
    ids = list(dict.fromkeys(map(int, gpu.split(","))))
    if max(ids) >= count:
        there = f"0 to {count - 1}" if count > 1 else "only 0" if count else "none"
        raise InputError(
            f"-gpu {gpu}: there is no GPU {max(ids)}; CUDA devices here: {there}. Leave -gpu out, or give -gpu cpu"
        )
    return ids


def choose_device(gpu: str | None) -> tuple[torch.device, list[int]]:
    """``-gpu`` to the main device and the CUDA ids to spread over; none on the CPU. Says which device is used."""
    ids, more = gpu_numbers(gpu), ""
    if not ids:
        status("device: cpu" + ("" if gpu else " (no CUDA device found)"))
        return torch.device("cpu"), []
    if gpu is None and len(ids) > 1:
        more, ids = f" ({len(ids)} found; -gpu 0,1 spreads over two)", ids[:1]
    torch.cuda.set_device(ids[0])
    status(f"device: cuda {','.join(map(str, ids))}, {torch.cuda.get_device_name(ids[0])}{more}")
    return torch.device("cuda", ids[0]), ids
