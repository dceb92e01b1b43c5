"""Directions of the input space: Fourier images, random ones, and NADs from a file.

A direction is a float32 tensor of shape (C, H, W) and unit Euclidean norm.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

PHASES = ("cosine", "sine")


def fourier_direction(
    frequency_y: int,
    frequency_x: int,
    *,
    height: int = 32,
    width: int = 32,
    num_channels: int = 1,
    phase: str = "cosine",
    channel: int | None = None,
) -> torch.Tensor:
    """The real Fourier image v ∝ cos 2π(k_y·y/H + k_x·x/W) (or sin), frequencies in cycles per image.

    The same image stands in every channel, or in `channel` alone.

    Returns:
        Tensor (C, H, W) of unit norm.

    Raises:
        ValueError: a frequency beyond half the image, or the sine of a frequency that is its own negative,
            which vanishes on every pixel.
    """
    for name, frequency, size in (("y", frequency_y, height), ("x", frequency_x, width)):
        if abs(frequency) > size // 2:
            raise ValueError(
                f"frequency {frequency} along {name} is outside the image: "
                f"expected {-(size // 2)} to {size // 2} for {size} pixels"
            )
    if channel is not None and not 0 <= channel < num_channels:
        raise ValueError(f"channel {channel} does not exist: expected 0 to {num_channels - 1}")
    y = torch.arange(height, dtype=torch.float64)[:, None] / height
    x = torch.arange(width, dtype=torch.float64) / width
    angle = 2 * torch.pi * (frequency_y * y + frequency_x * x)
    if phase == "sine" and 2 * frequency_y % height == 0 and 2 * frequency_x % width == 0:
        raise ValueError(
            f"the sine image of frequency ({frequency_y}, {frequency_x}) is zero everywhere: use the cosine"
        )
    image = torch.sin(angle) if phase == "sine" else torch.cos(angle)
    direction = torch.zeros(num_channels, height, width, dtype=torch.float64)
    direction[slice(None) if channel is None else channel] = image
    return (direction / direction.norm()).float()


def frequency_grid(size: int, step: int = 2) -> list[int]:
    """The frequencies of a map's axis in plotting order, DC in the middle: −16, −14, …, 14 for 32 pixels."""
    half = size // 2 // step * step
    return list(range(-half, (size + 1) // 2, step))


def canonical_frequency(frequency_y: int, frequency_x: int, height: int = 32, width: int = 32) -> tuple[int, int]:
    """The representative of ±(k_y, k_x), which are one experiment: the same image up to its sign.

    Both are wrapped into [−size/2, size/2), where a frequency and its aliases meet; the smaller pair is taken.
    """

    def wrap(frequency: int, size: int) -> int:
        return (frequency + size // 2) % size - size // 2

    plus = (wrap(frequency_y, height), wrap(frequency_x, width))
    minus = (wrap(-frequency_y, height), wrap(-frequency_x, width))
    return min(plus, minus)


def random_direction(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """A direction uniform on the sphere, shape (C, H, W)."""
    direction = torch.randn(shape, generator=generator)
    return direction / direction.norm()


def load_array(path: str | Path) -> np.ndarray:
    """Read an array of numbers from a .npy file, as float64.

    Raises:
        ValueError: not such a file.
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no array at {path}: name a .npy file (nad_computation.py makes NADs)")
    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
        return np.asarray(array, dtype=np.float64)
    except (ValueError, TypeError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npy array of numbers ({error})") from None


def load_nads(path: str | Path, dimension: int) -> torch.Tensor:
    """Read NADs from a .npy file: orthonormal rows, most important first.

    The authors' files lack the last row; it is the one direction orthogonal to all others, and is put back.

    Args:
        path: file with an array (D, D) or (D − 1, D).
        dimension: D, the number of pixels times channels.

    Returns:
        Tensor (D, D), float32.

    Raises:
        ValueError: not such an array, or rows that are not orthonormal (to 1e-3).
        FileNotFoundError: no such file.
    """
    rows = load_array(path)
    if rows.ndim != 2 or rows.shape[1] != dimension or rows.shape[0] not in (dimension - 1, dimension):
        raise ValueError(f"{path} has shape {rows.shape}: expected ({dimension}, {dimension}), or one row less")
    with np.errstate(all="ignore"):
        error = np.abs(rows @ rows.T - np.eye(len(rows))).max()
    if not error < 1e-3:  # nan fails too
        raise ValueError(f"the rows of {path} are not orthonormal: U Uᵀ differs from I by {error:.2g}")
    if len(rows) == dimension - 1:
        residual = np.eye(dimension) - rows.T @ rows  # projector onto the missing direction
        last = residual[:, np.argmax(np.diag(residual))]
        rows = np.vstack([rows, last / np.linalg.norm(last)])
    return torch.from_numpy(rows).float()
