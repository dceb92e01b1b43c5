"""Ranks: the processes that share a run's work, started by torchrun or, on a CPU, by the script itself."""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from tqdm import tqdm

PARENT = os.getppid()  # as early as can be: it changes when the parent dies
SMALL_MODEL = 2_000_000  # parameters; LeNet has 0.06 million, DenseNet-121 7 million


def rank() -> int:
    """This process's number among the ranks, 0 without any."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks share the work, 1 without any."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(items: Sequence[Any]) -> Sequence[Any]:
    """This rank's part of the items: every world_size-th."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Wait until all ranks are here; a rank whose peers are gone ends: the first one said why."""
    try:
        if dist.is_initialized():
            dist.barrier()
    except RuntimeError:
        if "RANK" not in os.environ:
            time.sleep(5)  # the script that started the ranks ends this one, once it has seen which was first
        raise SystemExit(f"\nrank {rank()}: another rank has ended; the same command continues") from None


def rank_device(device: torch.device) -> torch.device:
    """The device of this rank: a plain "cuda" becomes the GPU with the rank's number on this machine."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return device


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warn_of_unusable_gpu(device: torch.device) -> None:
    """Say on stderr that this machine has a GPU which torch cannot use: it would fail, or train for days on a CPU."""
    usable = torch.cuda.is_available()
    if usable and device.type == "cuda":  # kernels run on later minor versions of their compute capability, too
        major, minor = torch.cuda.get_device_capability(device)
        usable = any(f"sm_{major}{before}" in torch.cuda.get_arch_list() for before in range(minor + 1))
    if not usable and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
        text = f"torch {torch.__version__} cannot use this GPU: update its driver, or install another torch (README)"
        print(f"\033[31m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def is_small(model: nn.Module, device: torch.device) -> bool:
    """Whether a network is trained fastest on one thread."""
    return device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL


def launch(
    function: Callable[..., Any], *args: Any, device: torch.device, small: bool = False, items: int | None = None
) -> None:
    """Call `function(*args)` on every rank.

    Under torchrun this process is a rank already. Otherwise one rank is started on each core for a small network, each
    of one thread; else all cores work in one process. No more ranks than `items` take part. Whatever else the machine
    does, sums are taken in the same order.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", num_cores()))
    size = min(size, items or size)
    if rank == 0:
        warn_of_unusable_gpu(device)
    if "RANK" in os.environ:
        if rank >= size:
            return
        if "TORCHELASTIC_RUN_ID" in os.environ:  # launchers other than torchrun may end before their ranks
            _end_with(PARENT)
        threads = 1 if small else max(1, num_cores() // min(size, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        _be_rank(function, args, threads, "env://", rank, size)
    elif small and size > 1:
        with tempfile.TemporaryDirectory() as folder:
            meeting_point = (Path(folder) / "ranks").as_uri()
            logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the rank that fails says why
            try:
                mp.spawn(_spawned, (function, args, meeting_point, size), nprocs=size, daemon=True)
            except mp.ProcessExitedException as error:
                if error.signal_name is not None:
                    raise SystemExit(f"\na rank was ended by {error.signal_name}: the same command continues") from None
                raise SystemExit(error.exit_code) from None
    else:
        torch.set_num_threads(1 if small else num_cores())
        function(*args)


def _spawned(rank: int, function: Callable[..., Any], args: tuple, meeting_point: str, size: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the script that started the ranks ends them
    _end_with(mp.parent_process().pid)
    tqdm.set_lock(threading.RLock())  # its lock between processes would be left behind by a rank that is killed
    _be_rank(function, args, 1, meeting_point, rank, size)


def _end_with(parent: int) -> None:
    """End this rank as soon as its parent is gone: the next command would find the run's folder in use."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _be_rank(
    function: Callable[..., Any], args: tuple, threads: int, meeting_point: str, rank: int, size: int
) -> NoReturn:
    """Join the group, call the function, and end. The ranks exchange little, and from CPU memory: gloo serves all."""
    torch.set_num_threads(threads)
    patience = timedelta(days=7)  # a rank may wait long for the others' last items
    code: Any = 0
    try:
        dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=size, timeout=patience)
        function(*args)
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort an interpreter that ends in the ordinary way
