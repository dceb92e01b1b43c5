"""How a function of images changes with each pixel: central differences, or the exact Jacobian."""

from collections.abc import Callable

import torch

Features = Callable[[torch.Tensor], torch.Tensor]  # images (N, C, H, W) -> (N, F)


@torch.no_grad()
def central_differences(
    function: Features, point: torch.Tensor, *, step: float = 100.0, chunk_size: int = 32
) -> torch.Tensor:
    """Δ_i = (h(x + s·e_i) − h(x − s·e_i)) / 2s along each pixel e_i.

    Args:
        function: h, maps images (N, C, H, W) to (N, F).
        point: x, shape (C, H, W).
        step: s.
        chunk_size: images evaluated at once, the two of each pixel together; the result does not depend on it.

    Returns:
        Tensor (F, D), D = C·H·W: row f is the gradient estimate of feature f.
    """
    flat = point.flatten()
    differences = []
    for pixels in torch.arange(flat.numel(), device=point.device).split(max(1, chunk_size // 2)):
        images = flat.repeat(2 * len(pixels), 1)  # (2·pixels, D): the point, moved up, then down
        row = torch.arange(len(pixels), device=point.device)
        images[row, pixels] += step
        images[row + len(pixels), pixels] -= step
        images = images.view(-1, *point.shape).contiguous(memory_format=torch.channels_last)
        up, down = function(images).chunk(2)
        differences.append((up - down) / (2 * step))
    return torch.cat(differences).T


def autograd_jacobian(function: Features, point: torch.Tensor, *, chunk_size: int = 32) -> torch.Tensor:
    """The Jacobian of `function` at `point` by backpropagation: the limit of a small step, shape (F, D)."""
    jacobian = torch.func.jacrev(lambda x: function(x[None])[0], chunk_size=chunk_size)(point)
    return jacobian.detach().flatten(1)
