"""The start of every script: processes, device, seed."""

import os
import re

import numpy as np
import torch

from utils import InputError, status


def choose_seed(seed: int) -> int:
    """The seed itself, or a drawn one for 0, which is printed."""
    if seed:
        return seed
    seed = int.from_bytes(os.urandom(4), "big") or 1
    status(f"seed: {seed}")
    return seed


def set_seed(seed: int, *, deterministic: bool = False) -> None:
    """Seed everything.

    Args:
        deterministic: on a GPU, take deterministic kernels instead of the fastest ones.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that draw from numpy's global generator


def gpu_numbers(gpu: str | None) -> list[int]:
    """The CUDA ids that ``-gpu`` names, or all there are; none for the CPU.

    Raises:
        InputError: an id that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        return list(range(count))
    if gpu.strip().lower() == "cpu":
        return []
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", gpu.strip()):
        raise InputError(f'-gpu {gpu}: expected GPU numbers joined by commas, as in 0,1, or "cpu"')
    ids = list(dict.fromkeys(int(part) for part in gpu.split(",")))
    missing = [number for number in ids if number >= count]
    if missing:
        there = f"0 to {count - 1}" if count > 1 else "only 0" if count else "none"
        raise InputError(
            f"-gpu {gpu}: there is no GPU {missing[0]}; CUDA devices here: {there}. Leave -gpu out, or give -gpu cpu"
        )
    return ids


def choose_device(gpu: str | None) -> tuple[torch.device, list[int]]:
    """``-gpu`` to the main device and the CUDA ids to spread over; none on the CPU. Says which device is used."""
    ids = gpu_numbers(gpu)
    if not ids:
        status("device: cpu" + ("" if gpu else " (no CUDA device found)"))
        return torch.device("cpu"), []
    more = ""
    if gpu is None and len(ids) > 1:
        more, ids = f" ({len(ids)} found; -gpu 0,1 spreads over two)", ids[:1]
    torch.cuda.set_device(ids[0])
    status(f"device: cuda {','.join(map(str, ids))}, {torch.cuda.get_device_name(ids[0])}{more}")
    return torch.device("cuda", ids[0]), ids
