"""Processes that share a run: copies of a command on this machine, or those that torchrun starts on many.

Each reads RANK, WORLD_SIZE and LOCAL_RANK, does its part, and waits for nobody.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refusals import Refusal

ROOT = Path(__file__).resolve().parents[1]
SMALL_MODEL = 2_000_000  # parameters; LeNet has 0.06 million, DenseNet-121 7 million
LIBRARIES = 0.8e9  # bytes of memory that each process holds before it has any data
# What a copy runs: it knows the process that started it before it imports anything heavy.
COPY = (
    f"import sys; sys.path[:] = [{str(ROOT)!r}, *filter(None, sys.path)]; from utils.copies import be_copy; be_copy()"
)


def rank() -> int:
    """This process's number among those that share the run, 0 if it is alone.

    Raises:
        Refusal: the environment has a RANK without a WORLD_SIZE above it.
    """
    number = _of_environment("RANK")
    if "RANK" in os.environ and number >= _of_environment("WORLD_SIZE"):
        size = os.environ.get("WORLD_SIZE")
        raise Refusal(f"RANK is {number} and WORLD_SIZE is {size}: expected a larger WORLD_SIZE, as torchrun sets it")
    return number


def world_size() -> int:
    """How many processes share the run."""
    return _of_environment("WORLD_SIZE") if "RANK" in os.environ else 1


def _of_environment(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise Refusal(f"the environment variable {name} is {text!r}: expected a whole number, as torchrun sets it")
    return int(text)


def is_copy() -> bool:
    """Whether `run_copies` started this process: it works in silence, and what started it reports."""
    return "utils.copies" in sys.modules


def speaks() -> bool:
    """Whether this process shows progress and says what the others would say, too."""
    return rank() == 0 and not is_copy()


def own_part(items: Sequence[Any]) -> Sequence[Any]:
    """This process's part of the items: every n-th by its number in the whole list, whatever is done of them."""
    return items[rank() :: world_size()]


def own_device(device: torch.device) -> torch.device:
    """The device of this process: a plain "cuda" becomes the GPU with its number on this machine."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", _of_environment("LOCAL_RANK") % torch.cuda.device_count())
    return device


def num_cores() -> int:
    """Cores that this process may use, by its affinity and by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group("cpu.max").split()  # microseconds of each period, or "max"
    if len(quota) == 2 and quota[0].isdecimal():
        cores = min(cores, -(-int(quota[0]) // int(quota[1])))
    return max(1, cores)


def free_memory() -> float:
    """Bytes of memory that are left to this process; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = float("inf")
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    if not (limit.isdecimal() and used.isdecimal()):
        return available
    stat = dict(line.split() for line in _control_group("memory.stat").splitlines())
    cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when it is needed
    return min(available, int(limit) - int(used) + cached)


def _control_group(file: str) -> str:
    try:
        group = Path("/proc/self/cgroup").read_text().split("::")[-1].strip()  # version 2 has one line, "0::/path"
        return Path(f"/sys/fs/cgroup{group}/{file}").read_text().strip()
    except OSError:
        return ""


def is_small(model: nn.Module, device: torch.device) -> bool:
    """Whether a network is trained fastest on one thread: on a CPU, with few parameters."""
    return device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL


def default_number(small: bool, items: int, memory: float = 0) -> int:
    """Copies for so many items: one per core for a small network, as far as there is memory for each; else one."""
    if not small or "RANK" in os.environ:
        return 1
    return max(1, min(num_cores(), items, int(free_memory() / (LIBRARIES + memory))))


def set_threads(small: bool) -> None:
    """One thread for a small network, else OMP_NUM_THREADS, which copies and torchrun have, or all cores."""
    if small or not {"RANK", "OMP_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(1 if small else num_cores())


def run_copies(
    script: str, argv: Sequence[str] | None, number: int, progress: AbstractContextManager[Callable[[], Any]]
) -> None:
    """Run `number` copies of this command, and wait for them: then its own part of the work is done already.

    Returns at once if one is enough, or if this process is one of several. `progress` is a bar, and gives what
    refreshes it. A copy that fails says why, and leaves the others alone; SystemExit with the worst of their codes.
    """
    if number <= 1 or "RANK" in os.environ:
        return
    command = [sys.executable, "-c", COPY, str(os.getpid()), script, *(sys.argv[1:] if argv is None else argv)]
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores() // number))}
    ranks = [{"RANK": str(i), "WORLD_SIZE": str(number), "LOCAL_RANK": str(i)} for i in range(number)]
    copies: list[subprocess.Popen] = []
    try:
        with _keyboard_blocked():
            copies += [subprocess.Popen(command, env=os.environ | threads | own) for own in ranks]
        with progress as refresh:
            while any(copy.poll() is None for copy in copies):
                time.sleep(0.1)
                refresh()
            refresh()
    finally:
        for copy in copies:
            copy.kill()
            copy.wait()
    for copy in copies:
        if copy.returncode < 0:
            name = signal.Signals(-copy.returncode).name
            print(f"a worker was ended by {name}: the same command continues", file=sys.stderr, flush=True)
    if any(copy.returncode for copy in copies):
        raise SystemExit(max(128 - code if (code := copy.returncode) < 0 else code for copy in copies))


@contextmanager
def _keyboard_blocked() -> Iterator[None]:
    """Ctrl-C reaches this process only once the block has ended, and processes started within it never."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
