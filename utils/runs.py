"""A run's folder: its configuration, a CSV row for each finished item, and files that appear whole or not at all."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import distributed


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

    All ranks call this; rank 0 does it, and holds the folder until the block ends.

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
            f"{path.parent} holds a run with other settings ({'; '.join(differing)}): choose another folder"
        )


def read_rows(path: Path) -> list[dict[str, str]]:
    """The finished rows of a CSV file, none if there is no file. A last line cut short by a kill does not count."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return list(csv.DictReader(io.StringIO(whole.decode())))


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


def sort_rows(path: Path, key: Callable[[dict[str, str]], Any]) -> list[dict[str, str]]:
    """Rewrite a CSV file in an order that does not depend on who finished when; return its rows."""
    rows = sorted(read_rows(path), key=key)
    write_rows(path, rows)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file, whole or not at all. The first row's keys are the header."""
    rows = list(rows)
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
