"""What the benchmarks share: processes of their own, their memory, and what the machine can do at most."""

import multiprocessing
import queue
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from utils.training import precision_mode


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, in GB: of this process, or on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text()  # not getrusage, whose peak is inherited
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6


def in_processes(number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call the function in so many new processes at once, and return what they return."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_put, args=(results, function, *args)) for _ in range(number)]
    for process in processes:
        process.start()
    found = []
    while len(found) < number:
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit(f"{function.__name__} failed") from None
    for process in processes:
        process.join()
    return found


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call the function in a process of its own, whose peak memory is its alone, and return what it returns."""
    return in_processes(1, function, *args)[0]


def _put(results: Any, function: Callable[..., Any], *args: Any) -> None:
    multiprocessing.set_start_method(None, force=True)  # a DataLoader's workers start as they do elsewhere
    results.put(function(*args))


def rate(work: Callable[[], Any], operations: float, device: torch.device, seconds: float = 2.0) -> float:
    """Operations a second of some work, repeated for so many seconds after a first time; the best of the repeats."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, best = time.perf_counter() + seconds, once()
    while time.perf_counter() < end:
        best = min(best, once())
    return operations / best


@torch.no_grad()
def ceilings(device: torch.device) -> dict[str, tuple[float, float]]:
    """The machine's rate, operations a second, of a large matrix product and a large convolution in each precision."""
    n, channels, size, count = (8192, 256, 32, 512) if device.type == "cuda" else (3072, 128, 32, 32)
    found = {}
    for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
        options = {"device": device, "dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
        a, b = torch.randn(2, n, n, **options)
        images = torch.randn(count, channels, size, size, **options).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, **options).contiguous(memory_format=torch.channels_last)
        with precision_mode("tf32" if precision == "tf32" else "fp32", device):
            found[precision] = (
                rate(lambda a=a, b=b: a @ b, 2 * n**3, device),
                rate(
                    lambda images=images, weight=weight: F.conv2d(images, weight, padding=1),
                    2 * 9 * channels**2 * images[:, 0].numel(), device,
                ),
            )  # fmt: skip
    return found
