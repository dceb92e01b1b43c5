"""Directions of the input space: Fourier images and random ones.

A direction is a float32 tensor of shape (C, H, W) and unit Euclidean norm.
"""

import torch

from refusals import Refusal


def fourier_direction(
    frequency_y: int, frequency_x: int, *, size: int = 32, num_channels: int = 1, phase: str = "cosine"
) -> torch.Tensor:
    """The real Fourier image v ∝ cos 2π(k_y·y + k_x·x)/S (or sin), the same in every channel, (C, S, S) of unit norm.

    Frequencies are in cycles per image. A Refusal for one beyond half the image, or the sine of a frequency that is
    its own negative, which vanishes on every pixel.
    """
    for name, frequency in (("y", frequency_y), ("x", frequency_x)):
        if abs(frequency) > size // 2:
            expected = f"{-(size // 2)} to {size // 2} for {size} pixels"
            raise Refusal(f"frequency {frequency} along {name} is outside the image: expected {expected}")
    if phase == "sine" and is_self_conjugate(frequency_y, frequency_x, size):
        raise Refusal(f"the sine image of ({frequency_y}, {frequency_x}) is zero everywhere: use the cosine")
    pixels = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi * (frequency_y * pixels[:, None] + frequency_x * pixels) / size
    image = (torch.sin(angle) if phase == "sine" else torch.cos(angle)).repeat(num_channels, 1, 1)
    return (image / image.norm()).float()


def is_self_conjugate(frequency_y: int, frequency_x: int, size: int) -> bool:
    """Whether a frequency is an alias of its own negative: its sine image vanishes."""
    return 2 * frequency_y % size == 0 and 2 * frequency_x % size == 0


def fourier_map(
    size: int = 32, *, num_channels: int = 1, phase: str = "cosine", frequencies: list[tuple[int, int]] | None = None
) -> dict[tuple[int, int], torch.Tensor]:
    """Fourier images (C, S, S) by their canonical frequency: those asked for, or every distinct cell of the map.

    A sine map leaves out the frequencies whose sine vanishes.
    """
    if frequencies is None:
        grid = frequency_grid(size)
        cells = [(y, x) for y in grid for x in grid if phase == "cosine" or not is_self_conjugate(y, x, size)]
    else:
        cells = frequencies
    images = {}
    for y, x in cells:
        image = fourier_direction(y, x, size=size, num_channels=num_channels, phase=phase)  # refuses one outside
        images.setdefault(canonical_frequency(y, x, size), image)
    return images


def frequency_grid(size: int, step: int | None = None) -> list[int]:
    """The frequencies of a map's axis in plotting order, DC in the middle: −16, −14, …, 14 for 32 pixels.

    Without a step, 16 cells on each axis at the same cycles per pixel, for multiples of 16 pixels from 32 on.
    """
    step = step or max(2, size // 16)
    half = size // 2 // step * step
    return list(range(-half, (size + 1) // 2, step))


def canonical_frequency(frequency_y: int, frequency_x: int, size: int = 32) -> tuple[int, int]:
    """The representative of ±(k_y, k_x), which are one experiment: the same image up to its sign.

    Both are wrapped into [−size/2, size/2), where a frequency and its aliases meet; the smaller pair is taken.
    """

    def wrap(frequency: int) -> int:
        return (frequency + size // 2) % size - size // 2

    return min((wrap(frequency_y), wrap(frequency_x)), (wrap(-frequency_y), wrap(-frequency_x)))


def random_direction(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """A direction uniform on the sphere, shape (C, H, W)."""
    direction = torch.randn(shape, generator=generator)
    return direction / direction.norm()
