"""How a function of images changes with each pixel: central differences, or the exact Jacobian."""

import itertools
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from utils.locality import NotLocal, shifted_images, whole

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
    spacing = 1  # between the pixels of a chunk; a power of two, a multiple of the strides of most convolutions
    while spacing < max(height, width) and 2 * -(-height // spacing) * -(-width // spacing) > chunk_size:
        spacing *= 2
    firsts = itertools.product(range(channels), range(min(spacing, height)), range(min(spacing, width)))
    differences = None
    for channel, *first in firsts:
        images, pixels = shifted_images(point, channel, tuple(first), spacing, step)
        try:
            up, down = function(images if local else whole(images)).chunk(2)
        except NotLocal:
            up, down = function(whole(images)).chunk(2)
        if differences is None:
            exact = torch.promote_types(up.dtype, torch.float32)  # not the type of autocast
            differences = up.new_empty(point.numel(), *up.shape[1:], dtype=exact)
        differences[pixels] = (up.to(exact) - down.to(exact)) / (2 * step)
    return differences.T


@torch.no_grad()
def local_pays(function: Features, point: torch.Tensor, *, step: float = 100.0) -> bool:
    """Whether the local evaluation of `function` gives the same and saves a tenth of the operations.

    It is tried on some pixels all over the image, at each of four phases of its strides. It fails for a function that
    changes tensors in place in ways that windows cannot follow, or that bypasses PyTorch's dispatch to subclasses.
    """
    spacing = 1 << max(0, max(point.shape[1:]).bit_length() - 2)  # a power of two, as in `central_differences`
    try:
        for phase in range(min(4, *point.shape[1:])):
            images, _ = shifted_images(point, 0, (phase, phase), spacing, step)
            (up, down), (local_up, local_down) = (function(batch).chunk(2) for batch in (whole(images), images))
            error, largest = (local_up - local_down - up + down).abs().max(), (up - down).abs().max()
            if not (0 < largest and error <= 1e-3 * largest):  # so written for nan
                return False
        operations = []
        for batch in (whole(images), images):
            with FlopCounterMode(display=False) as counter:  # not above: it changes what some functions do
                function(batch)
            operations.append(counter.get_total_flops())
    except Exception:  # a real error shows again in the plain evaluation
        return False
    return operations[1] <= 0.9 * operations[0]


def autograd_jacobian(function: Features, point: torch.Tensor, *, chunk_size: int = 32) -> torch.Tensor:
    """The Jacobian of `function` at `point` by backpropagation: the limit of a small step, shape (F, D)."""
    jacobian = torch.func.jacrev(lambda x: function(x[None])[0], chunk_size=chunk_size)(point)
    return jacobian.detach().flatten(1)
