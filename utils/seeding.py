"""Every random number belongs to a named piece of work, never to a process or to what ran before."""

import contextlib
import hashlib
from collections.abc import Iterator

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
    """Seed torch's own generator (weight initialisation, dropout) and restore its state afterwards."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*parts))
        yield
