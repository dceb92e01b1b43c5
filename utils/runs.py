"""A run's folder: its configuration, a CSV row for each finished item, and files that appear whole or not at all."""

import contextlib
import csv
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils import distributed, files, tables

ROWS = "accuracies.csv"  # in a run's folder
CHECKPOINT_SECONDS = 50  # between two checkpoints of the same work


def settings(args: Namespace, *free: str, **derived: Any) -> dict[str, Any]:
    """What a run's numbers depend on: all of its arguments less the few, `free`, that change no row.

    `derived` settings stand in for an argument of that name, or are known only once a file has been read.
    """
    free = {"output", "published", *free}
    return {key: value for key, value in vars(args).items() if key not in free} | {"device": args.device.type} | derived


def device_name(device: torch.device) -> str:
    """The model of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """What numbers may depend on besides the settings: code, versions, device and ranks; for the record."""
    here, commit = Path(__file__).resolve().parent, ""
    if git := shutil.which("git"):
        head = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # "-dirty" after an edit
        commit = subprocess.run(head, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "ranks": distributed.world_size(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


@contextlib.contextmanager
def open_run(folder: Path, settings: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Create the folder with its config.json, or check that the run in it has the same settings; ValueError if not.

    All ranks call this. Rank 0 does the work, and holds the folder's lock until the block ends.
    """
    with contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                fcntl.flock(stack.enter_context(open(folder / ".lock", "w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is in use by another process: wait, or choose another folder") from None
            check_settings(folder, settings)
            for temporary in folder.glob(".*.[0-9]*.tmp"):  # of a command that was killed while it wrote
                temporary.unlink()
            if not (folder / "config.json").exists():
                files.save_json(folder / "config.json", {"settings": settings, "environment": environment(device)})
        distributed.barrier()
        yield


def check_settings(folder: Path, settings: dict[str, Any], ignoring: Sequence[str] = ()) -> None:
    """Refuse a folder that holds a run with other settings: a ValueError names those that differ."""
    path = folder / "config.json"
    if not path.exists():
        return
    now, before = json.loads(json.dumps(settings, default=str)), files.read_json(path, "settings")["settings"]
    advice = "give the same, choose another folder, or delete this one"
    refuse_changes(f"{folder} holds a run with", before | {key: now.get(key) for key in ignoring}, now, advice)


def refuse_changes(what: str, before: dict[str, Any], now: dict[str, Any], advice: str) -> None:
    """A ValueError names the settings that differ between what is there and what is asked for."""
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
        raise ValueError(f"{what} other settings ({changes}): {advice}")


def announce(what: str, wanted: int, done: int, device: torch.device, folder: Path) -> None:
    """Print, on rank 0, what is about to be done, how much of it is there already, on what, and where it goes."""
    if distributed.rank() == 0:
        print(
            f"{what}: {wanted}, {done} of them done; {device} ({device_name(device)}), "
            f"ranks: {distributed.world_size()}, threads of each: {torch.get_num_threads()}; results in {folder}",
            flush=True,
        )


def do_items(
    folder: Path,
    keys: Sequence[str],
    items: Sequence[tuple[int, ...]],
    work: Callable[[tuple[int, ...], Path], dict[str, float]],
    *,
    what: str,
    device: torch.device,
) -> list[dict[str, str]]:
    """Do the items that an open run lacks, shared among the ranks, one row each; return all rows once all are done.

    `keys` are columns, whole numbers that together name an item, and `items` their values. `work(item, checkpoint)`
    does one item and returns the rest of its row; until then it may keep its state in the file `checkpoint`.
    """

    def checkpoint_of(item: tuple[int, ...]) -> Path:
        return folder / f"checkpoint-{'_'.join(map(str, item))}.pt"

    done = {tuple(int(row[key]) for key in keys) for row in tables.read_rows(folder / ROWS, keys)}
    distributed.barrier()  # all have read before one writes
    announce(what, len(items), len(done.intersection(items)), device, folder)
    for item in done:
        checkpoint_of(item).unlink(missing_ok=True)  # of a command that was killed after it had written the row
    mine = distributed.own_part([item for item in items if item not in done])
    for item in tqdm(mine, desc=f"{what}, rank 0", disable=distributed.rank() > 0):
        start = time.perf_counter()
        found = {name: f"{value:.6g}" for name, value in work(item, checkpoint_of(item)).items()}
        seconds = {"seconds": f"{time.perf_counter() - start:.2f}"}
        append_row(folder / ROWS, dict(zip(keys, item, strict=True)) | found | seconds)
        checkpoint_of(item).unlink(missing_ok=True)
    distributed.barrier()
    rows = sorted(tables.read_rows(folder / ROWS, keys), key=lambda row: [int(row[key]) for key in keys])
    if distributed.rank() == 0:
        tables.write_rows(folder / ROWS, rows)  # in the order of their keys, not of who finished when
    return rows


def print_diverged(folder: Path, rows: list[dict[str, str]], keys: Sequence[str], max_lr: float) -> None:
    """Say which trainings of a run diverged; ValueError if all did."""
    diverged = [tuple(int(row[key]) for key in keys) for row in rows if row["test_accuracy"] == "nan"]
    if diverged:
        print(f"{len(diverged)} of {len(rows)} trainings diverged and are left out ({', '.join(keys)}): {diverged}")
    if len(diverged) == len(rows):
        raise ValueError(f"no training in {folder} ended with a finite loss: try a smaller --max-lr than {max_lr}")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file that all ranks write to, its header first."""
    with open(path, "a+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # released on closing
        content = file.seek(0) or file.read()
        whole = content.rfind(b"\n") + 1
        if whole and next(csv.reader(content[:whole].decode(errors="replace").splitlines())) != list(row):
            raise ValueError(f"{path} has other columns than {', '.join(row)}: name another file")
        file.truncate(whole)  # a line that a kill cut short
        file.write(tables.csv_text([row], header=not whole).encode())
        file.flush()
        os.fsync(file.fileno())
