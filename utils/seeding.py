"""Every random number belongs to a named piece of work, never to a process or to what ran before."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all the parts, such as (0, "lenet", 17)."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device`, seeded by the parts."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


@contextlib.contextmanager
def default_generator(device: torch.device | str, *parts: int | str) -> Iterator[None]:
    """Seed the global generators of torch (initial weights, dropout), NumPy and Python; then restore their states."""
    device, seed = torch.device(device), seed_of(*parts)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
