"""Ranks: the processes that share a run's work, started by torchrun or, on a CPU, by the script itself."""

import contextlib
import ctypes
import datetime
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from tqdm import tqdm

Item = TypeVar("Item")

PEER_LOST = 3  # exit code of a rank that waits for one that has ended
PARENT = os.getppid()  # as early as can be: it changes when the parent dies
SMALL_MODEL_FLOPS = 20_000_000  # a forward pass of one image; LeNet has 0.8 million, VGG-11 306 million


def rank() -> int:
    """This process's number among the ranks, 0 without any."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks share the work, 1 without any."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's part of the items: every world_size-th."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        with _one_line_if_a_rank_is_lost():
            dist.barrier()


@contextlib.contextmanager
def _one_line_if_a_rank_is_lost() -> Iterator[None]:
    """End quietly where the ranks that this one waits for are gone: whoever was first has said why."""
    try:
        yield
    except RuntimeError as error:
        if "onnection" not in str(error):  # gloo: closed, or reset, by the peer
            raise
        if "RANK" in os.environ:
            print(f"\nrank {rank()}: another rank has ended; the same command continues", file=sys.stderr)
        else:
            time.sleep(5)  # the script that started the ranks ends this one, once it has seen which was first
        raise SystemExit(PEER_LOST) from None


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others; where it fails on rank 0 they end quietly, with nothing to add."""
    failure = None
    if rank() == 0:
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
    failed = sum_over_ranks(torch.tensor(int(failure is not None)))
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(2)
    if rank() > 0:
        yield
    barrier()  # nobody changes what the others still read


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' CPU tensors, on all of them."""
    if dist.is_initialized():
        tensor = tensor.clone()
        with _one_line_if_a_rank_is_lost():
            dist.all_reduce(tensor)
    return tensor


def rank_device(device: torch.device) -> torch.device:
    """The device of this rank: a plain "cuda" becomes the GPU with the rank's number on this machine."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return device


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let glibc reuse what is freed instead of giving it back: a step's tensors are as large as the last step's.

    Otherwise every step faults its pages in anew, a fifth of the time of a LeNet step. Elsewhere this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the largest that glibc takes


def launch(function: Callable[..., Any], *args: Any, device: torch.device, model_flops: int) -> None:
    """Call `function(*args)` on every rank.

    Under torchrun this process is a rank already. Otherwise, on a CPU, a small model is trained fastest on one
    thread, so one rank a core is started; a large one uses all cores in one process. The rule looks at the
    device and the model alone, so that sums are taken in the same order whatever else the machine does.
    """
    try:
        _launch(function, args, device, small=model_flops < SMALL_MODEL_FLOPS)
    except KeyboardInterrupt:
        print("\nstopped: the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def _launch(function: Callable[..., Any], args: tuple, device: torch.device, *, small: bool) -> None:
    keep_freed_memory()
    if "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # launchers other than torchrun may end before their ranks
            _end_with(PARENT)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        _enter(function, args, 1 if small else max(1, num_cores() // local), "env://", None)
    elif device.type == "cpu" and small and num_cores() > 1:
        with tempfile.TemporaryDirectory() as folder:
            meeting_point = (Path(folder) / "ranks").as_uri()
            logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the rank that fails says why
            try:
                mp.spawn(_spawned, (function, args, meeting_point, num_cores()), nprocs=num_cores(), daemon=True)
            except mp.ProcessExitedException as error:
                if error.signal_name is not None:
                    message = f"a rank was ended by {error.signal_name}: the same command continues"
                    print(f"\n{message}", file=sys.stderr)
                raise SystemExit(error.exit_code if error.exit_code > 0 else 1) from None
    else:
        torch.set_num_threads(1 if small and device.type == "cpu" else num_cores())
        function(*args)


def _spawned(rank: int, function: Callable[..., Any], args: tuple, meeting_point: str, size: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the script that started the ranks ends them
    _end_with(mp.parent_process().pid)
    tqdm.set_lock(threading.RLock())  # its lock between processes would be left behind by a rank that is killed
    _enter(function, args, 1, meeting_point, (rank, size))


def _end_with(parent: int) -> None:
    """A rank must not outlive what started it and was killed: the next command would find the run's folder in use."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _enter(
    function: Callable[..., Any], args: tuple, threads: int, init_method: str, place: tuple[int, int] | None
) -> None:
    """Join the group and call the function. The ranks exchange little, and from CPU memory: gloo serves all."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    rank, size = place or (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    patience = datetime.timedelta(days=7)  # a rank may wait long for the others' last items
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size, timeout=patience)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
