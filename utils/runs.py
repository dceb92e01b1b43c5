"""A run's folder: its configuration, a CSV row for each finished item, and files that appear whole or not at all."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import math
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

from utils import distributed

ROWS = "accuracies.csv"  # in a run's folder
CHECKPOINT_SECONDS = 50  # between two checkpoints of the same work
# The columns of the paper's authors, in dft_accuracies.csv and nads.csv, by their names here.
AUTHORS_COLUMNS = {"frequency_y": "y", "frequency_x": "x", "nad_index": "index"}
AUTHORS_COLUMNS |= dict(logreg="acc_lr", lenet="acc_ln", vgg11="acc_vgg", resnet18="acc_rn", densenet121="acc_dn")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def save_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values with torch.save, whole or not at all."""
    buffer = io.BytesIO()  # torch.save into a file hides the reason, a full disk, behind a RuntimeError
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, to the CPU; ValueError if the file is not readable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common class for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the checkpoint {path} cannot be read ({reason}): delete it to start again") from None


def digest(content: bytes) -> str:
    """A short name for this content."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


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
                save_json(folder / "config.json", {"settings": settings, "environment": environment(device)})
        distributed.barrier()
        yield


def check_settings(folder: Path, settings: dict[str, Any], ignoring: Sequence[str] = ()) -> None:
    """Refuse a folder that holds a run with other settings: a ValueError names those that differ."""
    path = folder / "config.json"
    if not path.exists():
        return
    now, before = json.loads(json.dumps(settings, default=str)), read_json(path, "settings")["settings"]
    advice = "give the same, choose another folder, or delete this one"
    refuse_changes(f"{folder} holds a run with", before | {key: now.get(key) for key in ignoring}, now, advice)


def refuse_changes(what: str, before: dict[str, Any], now: dict[str, Any], advice: str) -> None:
    """A ValueError names the settings that differ between what is there and what is asked for."""
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
        raise ValueError(f"{what} other settings ({changes}): {advice}")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """These entries of what `save_json` wrote there; ValueError if they cannot be read."""
    try:
        content = json.loads(path.read_text())
        return {key: content[key] for key in keys}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read: choose another folder") from None


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

    done = {tuple(int(row[key]) for key in keys) for row in read_rows(folder / ROWS, keys)}
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
    rows = sorted(read_rows(folder / ROWS, keys), key=lambda row: [int(row[key]) for key in keys])
    if distributed.rank() == 0:
        write_rows(folder / ROWS, rows)  # in the order of their keys, not of who finished when
    return rows


def mean_and_spread(rows: list[dict[str, str]], keys: Sequence[str], column: str = "test_accuracy") -> dict[tuple, Any]:
    """An accuracy by `keys`, of rows that did not diverge: (mean, standard deviation or nan, number) of each key."""
    values: dict[tuple[int, ...], list[float]] = {}
    for row in rows:
        if math.isfinite(accuracy := float(row[column])):
            values.setdefault(tuple(int(row[key]) for key in keys), []).append(accuracy)
    return {
        key: (float(np.mean(group)), float(np.std(group, ddof=1)) if len(group) > 1 else math.nan, len(group))
        for key, group in values.items()
    }


def means(rows: list[dict[str, str]], keys: Sequence[str]) -> dict[tuple[int, ...], float]:
    """The mean test accuracy by `keys`, of rows that did not diverge."""
    return {index: mean for index, (mean, _, _) in mean_and_spread(rows, keys).items()}


def print_diverged(folder: Path, rows: list[dict[str, str]], keys: Sequence[str], max_lr: float) -> None:
    """Say which trainings of a run diverged; ValueError if all did."""
    diverged = [tuple(int(row[key]) for key in keys) for row in rows if row["test_accuracy"] == "nan"]
    if diverged:
        print(f"{len(diverged)} of {len(rows)} trainings diverged and are left out ({', '.join(keys)}): {diverged}")
    if len(diverged) == len(rows):
        raise ValueError(f"no training in {folder} ended with a finite loss: try a smaller --max-lr than {max_lr}")


def read_published(path: Path, keys: Sequence[str], column: str) -> list[tuple[tuple[int, ...], float]]:
    """The numbers in a column of somebody's CSV file that are not empty, each after the keys of its row."""
    try:
        rows = published_rows(path)
        found = [(tuple(int(row[key]) for key in keys), float(row[column])) for row in rows if row[column]]
        if not found:
            raise ValueError("it has none")
        return found
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        columns, reason = ", ".join((*keys, column)), f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a CSV file with numbers in columns {columns} ({reason})") from None


def published_rows(path: Path) -> list[dict[str, str]]:
    """The rows of somebody's CSV file; the authors' with the columns here, and frequencies for their cells 0 to 15."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    for row in rows:
        for ours, theirs in AUTHORS_COLUMNS.items():
            if theirs in row and ours not in row:
                row[ours] = str(2 * int(row[theirs]) - 16) if theirs in ("x", "y") else row[theirs]
    return rows


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, str]]:
    """The finished rows of a CSV file, none if there is no file. A last line cut short by a kill does not count.

    A row with too few or too many cells, or whose columns `keys` are not whole numbers, is a ValueError.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    reader, rows = csv.DictReader(io.StringIO(whole.decode(errors="replace"))), []
    try:
        for row in reader:
            for key in keys:
                int(row[key])
            if None in row or None in row.values():
                raise ValueError
            rows.append(row)
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        line = reader.line_num + isinstance(error, csv.Error)  # raised before the line is counted
        raise ValueError(f"line {line} of {path} is damaged: delete the line, or the file to start again") from None
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file that all ranks write to, its header first."""
    with open(path, "a+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # released on closing
        content = file.seek(0) or file.read()
        whole = content.rfind(b"\n") + 1
        if whole and next(csv.reader(content[:whole].decode(errors="replace").splitlines())) != list(row):
            raise ValueError(f"{path} has other columns than {', '.join(row)}: name another file")
        file.truncate(whole)  # a line that a kill cut short
        file.write(_csv_text([row], header=not whole).encode())
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file, whole or not at all. The first row's keys are the header."""
    with replacing(path) as temporary:
        temporary.write_text(_csv_text(rows, header=True))


def _csv_text(rows: Sequence[dict[str, Any]], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
