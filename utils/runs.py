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
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils import distributed

ROWS = "accuracies.csv"  # in a run's folder


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
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values with torch.save, whole or not at all."""
    buffer = io.BytesIO()  # torch.save into a file hides the reason, a full disk, behind a RuntimeError
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, to the CPU.

    Raises:
        ValueError: the file is not readable.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common class for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the checkpoint {path} cannot be read ({reason}): delete it to start again") from None


def digest(content: bytes) -> str:
    """A short name for this content."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def environment() -> dict[str, Any]:
    """What numbers may depend on besides the settings: versions, device and ranks; for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "ranks": distributed.world_size(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


@contextlib.contextmanager
def open_run(folder: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Create the folder with its config.json, or check that the run in it has the same settings.

    All ranks call this. Rank 0 does the work, and holds the folder's lock until the block ends.

    Raises:
        ValueError: other settings (the differing keys are named), or another process is at work there.
    """
    with contextlib.ExitStack() as stack:
        with distributed.first_rank_first():
            if distributed.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _lock(stack.enter_context(open(folder / ".lock", "w")), folder)
                for temporary in folder.glob(".*.tmp"):  # of a command that was killed while it wrote
                    temporary.unlink()
                check_settings(folder, settings)
                if not (folder / "config.json").exists():
                    save_json(folder / "config.json", {"settings": settings, "environment": environment()})
        yield folder


def _lock(file: io.TextIOBase, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another process: wait for it, or choose another folder") from None


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds a run with other settings.

    Raises:
        ValueError: it names the settings that differ, or says that the file with them cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    settings = json.loads(json.dumps(settings))
    try:
        before = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read: delete the folder, or choose another") from None
    differing = [
        f"{key} was {before.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path.parent} holds a run with other settings ({'; '.join(differing)}): "
            "give the same, or choose another folder"
        )


def finish(
    folder: Path, settings: dict[str, Any], keys: Sequence[str], items: Sequence[tuple[int, ...]],
    work: Callable[[tuple[int, ...]], dict[str, float]], report: Callable[[list[dict[str, str]]], None], *, what: str,
) -> None:  # fmt: skip
    """Do the items that the run in a folder lacks, shared among the ranks, a row each; then report, on rank 0.

    Args:
        folder: of the run.
        settings: see `open_run`.
        keys: columns of the rows, whole numbers that together name an item.
        items: the values of the keys of all that is asked for.
        work: does one item, and returns the rest of its row.
        report: given all rows of the folder, in the order of their keys.
        what: name of the progress bar.
    """
    with open_run(folder, settings):
        with distributed.first_rank_first():
            done = done_items(folder, keys)
        mine = distributed.share([item for item in items if item not in done])
        for item in tqdm(mine, desc=f"{what} of rank 0", disable=distributed.rank() > 0):
            start = time.perf_counter()
            row = dict(zip(keys, item, strict=True)) | {name: f"{value:.6g}" for name, value in work(item).items()}
            append_row(folder / ROWS, row | {"seconds": f"{time.perf_counter() - start:.2f}"})
        distributed.barrier()
        if distributed.rank() == 0:
            report(sort_rows(folder / ROWS, keys))


def done_items(folder: Path, keys: Sequence[str]) -> set[tuple[int, ...]]:
    """The items that have a row in the folder, by the values of their keys."""
    return {tuple(int(row[key]) for key in keys) for row in read_rows(folder / ROWS, keys)}


def mean_and_spread(
    rows: list[dict[str, str]], keys: Sequence[str]
) -> dict[tuple[int, ...], tuple[float, float, int]]:
    """Test accuracy of the rows that share their keys and did not diverge: mean, standard deviation or nan, number."""
    values: dict[tuple[int, ...], list[float]] = {}
    for row in rows:
        if math.isfinite(accuracy := float(row["test_accuracy"])):
            values.setdefault(tuple(int(row[key]) for key in keys), []).append(accuracy)
    return {
        key: (float(np.mean(group)), float(np.std(group, ddof=1)) if len(group) > 1 else math.nan, len(group))
        for key, group in values.items()
    }


def print_diverged(folder: Path, rows: list[dict[str, str]], keys: Sequence[str], max_lr: float) -> None:
    """Say which trainings of a run diverged.

    Raises:
        ValueError: all did.
    """
    diverged = [tuple(int(row[key]) for key in keys) for row in rows if row["test_accuracy"] == "nan"]
    if diverged:
        print(f"{len(diverged)} of {len(rows)} trainings diverged and are left out ({', '.join(keys)}): {diverged}")
    if len(diverged) == len(rows):
        raise ValueError(f"no training in {folder} ended with a finite loss: try a smaller --max-lr than {max_lr}")


def read_published(path: Path, keys: Sequence[str], column: str) -> list[tuple[tuple[int, ...], float]]:
    """The numbers in a column of somebody's CSV file that are not empty, each after the keys of its row."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        found = [(tuple(int(row[key]) for key in keys), float(row[column])) for row in rows if row[column]]
        if not found:
            raise ValueError("it has none")
        return found
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a CSV file with numbers in columns {', '.join((*keys, column))} "
            f"({type(error).__name__}: {error})"
        ) from None


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, str]]:
    """The finished rows of a CSV file, none if there is no file. A last line cut short by a kill does not count.

    Raises:
        ValueError: a row has too few or too many cells, or one of the columns `keys` is not a whole number in it.
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
        file.truncate(whole)  # a line that a kill cut short
        text = io.StringIO()
        writer = csv.DictWriter(text, row.keys(), lineterminator="\n")
        if not whole:
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def sort_rows(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """Rewrite a CSV file in the order of its keys, not of who finished when; return its rows."""
    rows = sorted(read_rows(path, keys), key=lambda row: [int(row[key]) for key in keys])
    write_rows(path, rows)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file, whole or not at all. The first row's keys are the header."""
    rows = list(rows)
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
