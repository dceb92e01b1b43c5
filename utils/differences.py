"""How a function of images changes with each pixel, by central differences."""

from collections.abc import Callable

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

Features = Callable[[torch.Tensor], torch.Tensor]  # images (N, C, H, W) -> (N, F)

CHUNK_SIZE = {"cpu": 64, "cuda": 1024}  # images evaluated at once: a CPU's caches like no more
PATIENCE = 30.0  # seconds after which the pixels of one network are shown as they are done


@torch.no_grad()
def central_differences(
    function: Features, point: torch.Tensor, *, step: float = 100.0, chunk_size: int | None = None
) -> torch.Tensor:
    """Δ_i = (h(x + s·e_i) − h(x − s·e_i)) / 2s along each pixel e_i, at an image x (C, H, W) with step s.

    Returns (F, D), D = C·H·W: row f is the gradient estimate of feature f. `chunk_size` images are evaluated at once,
    two for each pixel; by the device if None. It changes no result.
    """
    pixels = torch.arange(point.numel(), device=point.device)
    chunks = pixels.split(max(1, (chunk_size or CHUNK_SIZE[point.device.type]) // 2))
    differences = []
    for chunk in tqdm(chunks, desc="pixels", unit="chunk", leave=False, delay=PATIENCE):
        shift = step * one_hot(chunk, point.numel()).to(point.dtype).view(-1, *point.shape)  # s·e_i
        up, down = function(torch.cat([point + shift, point - shift])).to(point.dtype).chunk(2)  # not bf16
        differences.append((up - down) / (2 * step))
    return torch.cat(differences).T
