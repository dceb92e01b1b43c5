"""How a function of images changes with each pixel: central differences, or the exact Jacobian."""

import itertools
from collections.abc import Callable

import torch

from utils.locality import shifted_images, whole

Features = Callable[[torch.Tensor], torch.Tensor]  # images (N, C, H, W) -> (N, F)


@torch.no_grad()
def central_differences(
    function: Features, point: torch.Tensor, *, step: float = 100.0, chunk_size: int = 32, local: bool = False
) -> torch.Tensor:
    """Δ_i = (h(x + s·e_i) − h(x − s·e_i)) / 2s along each pixel e_i.

    Args:
        function: h, maps images (N, C, H, W) to (N, F).
        point: x, shape (C, H, W).
        step: s.
        chunk_size: images evaluated at once, the two of each pixel together; the result does not depend on it.
        local: evaluate only what a pixel changes, see `utils.locality`. The result is the same but for rounding.

    Returns:
        Tensor (F, D), D = C·H·W: row f is the gradient estimate of feature f.
    """
    channels, height, width = point.shape
    stride = 1  # between the pixels of a chunk; a power of two, to divide those of convolutions
    while stride < max(height, width) and 2 * -(-height // stride) * -(-width // stride) > chunk_size:
        stride *= 2
    firsts = itertools.product(range(channels), range(min(stride, height)), range(min(stride, width)))
    differences = None
    for channel, *first in firsts:
        images, pixels = shifted_images(point, channel, first, stride, step)
        up, down = function(images if local else whole(images)).chunk(2)
        if differences is None:
            differences = up.new_empty(point.numel(), *up.shape[1:])
        differences[pixels] = (up - down) / (2 * step)
    return differences.T


@torch.no_grad()
def may_be_local(function: Features, point: torch.Tensor, *, step: float = 100.0) -> bool:
    """Whether the local evaluation of `function` is exact, tried on some pixels all over the image.

    It is, unless the function changes a tensor in place where it should not, or sees the batch as a whole.
    """
    stride = 1 << max(0, max(point.shape).bit_length() - 2)  # a power of two, as `central_differences` takes
    images, _ = shifted_images(point, 0, (0, 0), stride, step)
    expected, found = function(whole(images)), function(images)
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())  # not for nan


def autograd_jacobian(function: Features, point: torch.Tensor, *, chunk_size: int = 32) -> torch.Tensor:
    """The Jacobian of `function` at `point` by backpropagation: the limit of a small step, shape (F, D)."""
    jacobian = torch.func.jacrev(lambda x: function(x[None])[0], chunk_size=chunk_size)(point)
    return jacobian.detach().flatten(1)
