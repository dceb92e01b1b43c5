"""What the benchmarks share: processes of their own, their memory, and what the machine can do at most."""

import multiprocessing
import queue
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from utils.training import precision_mode


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, in GB: of this process, or on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call the function in a process of its own, whose peak memory is its alone, and return what it returns."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_put, args=(results, function, *args))
    process.start()
    while True:
        try:
            result = results.get(timeout=1)
            break
        except queue.Empty:
            if not process.is_alive():
                raise SystemExit(f"{function.__name__} ended with exit code {process.exitcode}") from None
    process.join()
    return result


def _put(results: Any, function: Callable[..., Any], *args: Any) -> None:
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
    a, b = torch.randn(2, n, n, device=device)
    images = torch.randn(count, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    found = {}
    for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
        with precision_mode(precision, device):
            found[precision] = (
                rate(lambda: a @ b, 2 * n**3, device),
                rate(lambda: F.conv2d(images, weight, padding=1), 2 * 9 * channels**2 * images[:, 0].numel(), device),
            )
    return found
