"""How a function of images changes along directions of their space, by central differences."""

from collections.abc import Callable

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

Features = Callable[[torch.Tensor], torch.Tensor]  # images (N, C, H, W) -> (N, F)

CHUNK_PIXELS = {"cpu": 2**16, "cuda": 2**20}  # of the images evaluated at once: a CPU's caches like no more
PATIENCE = 30.0  # seconds after which the differences of one network are shown as they are done


@torch.no_grad()
def central_differences(
    function: Features,
    point: torch.Tensor,
    *,
    directions: torch.Tensor | None = None,
    step: float,
) -> torch.Tensor:
    """Δ_i = (h(x + s·v_i) − h(x − s·v_i)) / 2s at an image x (C, H, W) with step s, along unit vectors v (n, C, H, W).

    Without directions they are the pixels e_i, D = C·H·W. Returns (F, n), for the pixels (F, D), where row f
    is the gradient estimate of feature f. Images of CHUNK_PIXELS pixels together are evaluated at once.
    """
    numbers = torch.arange(point.numel() if directions is None else len(directions), device=point.device)
    chunks = numbers.split(max(1, CHUNK_PIXELS[point.device.type] // point[0].numel() // 2))  # two images for each
    differences = []
    for chunk in tqdm(chunks, desc="differences", unit="chunk", leave=False, delay=PATIENCE):
        along = one_hot(chunk, point.numel()).view(-1, *point.shape) if directions is None else directions[chunk]
        shift = step * along.to(point.dtype)  # s·v_i
        up, down = function(torch.cat([point + shift, point - shift])).to(point.dtype).chunk(2)  # not bf16
        differences.append((up - down) / (2 * step))
    return torch.cat(differences).T
