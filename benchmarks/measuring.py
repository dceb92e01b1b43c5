"""Measured work runs in processes of its own, so that its threads and its peak memory are its alone."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from models import build_model
from utils import distributed


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, in GB: of this process, or on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text()  # not getrusage, whose peak is inherited
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6


def how_many_at_once(arch: str, device: torch.device) -> int:
    """The processes that the scripts start for a network: one on each core for a small one (`distributed.launch`)."""
    size = sum(parameter.numel() for parameter in build_model(arch, 1, 1).parameters())
    return distributed.num_cores() if device.type == "cpu" and size < distributed.SMALL_MODEL else 1


def in_processes(number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call the function in so many new processes at once, which share the cores, and return what they return."""
    context = multiprocessing.get_context("spawn")
    threads, together = max(1, distributed.num_cores() // number), context.Barrier(number)
    with ProcessPoolExecutor(number, context, _enter, (threads, together)) as pool:
        return [future.result() for future in [pool.submit(function, *args) for _ in range(number)]]


def _enter(threads: int, together: Barrier) -> None:
    multiprocessing.set_start_method(None, force=True)  # a DataLoader's workers start as they do elsewhere
    torch.set_num_threads(threads)
    together.wait()
