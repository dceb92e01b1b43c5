"""Files that appear whole or not at all."""

import contextlib
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refusals import Refusal

CHECKPOINT_SECONDS = 50  # between two checkpoints of the same work


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # other machines may write here, too
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say for which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote, an hour ago or more."""
    for temporary in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if temporary.stat().st_mtime < time.time() - 3600:
                temporary.unlink()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def save_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        text = json.dumps(content, indent=2, default=str, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values with torch.save, whole or not at all."""
    buffer = io.BytesIO()  # torch.save into a file hides the reason, a full disk, behind a RuntimeError
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, key: str | None = None) -> Any:
    """Read what `save_checkpoint` wrote, to the CPU, or only one entry of it; a Refusal if it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=key is not None)
        return state if key is None else state[key]
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch names no common class for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(f"the checkpoint {path} cannot be read ({reason}): delete it to start again") from None


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """What `save_json` wrote there, with at least these keys; a Refusal if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content.keys() >= set(keys):
            raise ValueError
        return content
    except (ValueError, AttributeError):
        raise Refusal(f"{path} cannot be read: delete it, or choose another folder") from None


def digest(content: bytes) -> str:
    """A short name for this content."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
