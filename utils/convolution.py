"""Convolutions of small images, each as one matrix product: for training in bf16 on a CPU.

oneDNN works along the rows of an image, in tiles that an output of 4×4 pixels or less leaves nearly empty: the last
layers of a network take half of its time. As a product they take a tenth to a half of that.
"""

import math

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MAX_PIXELS = 16  # of the output; at 8×8, oneDNN's convolution is as fast


class SmallConvolutions(TorchFunctionMode):
    """Within it, the output of a convolution layer is a `product` if it is small (not in groups, not dilated)."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        """Call the function, or multiply instead."""
        if function is torch.conv2d and len(arguments) == 7 and arguments[5:] == ((1, 1), 1):
            x, weight, bias, stride, padding = arguments[:5]
            if x.ndim == 4 and not isinstance(padding, str):
                sides = zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
                if math.prod((side + 2 * pad - kernel) // step + 1 for side, pad, kernel, step in sides) <= MAX_PIXELS:
                    return product(x, weight, bias, stride, padding)
        return function(*arguments, **(keywords or {}))


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> torch.Tensor:
    """`F.conv2d` of x (N, C, H, W) with weight (O, C, h, w): for each output pixel a row of all that it sums over."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    last = [side - kernel + 1 for side, kernel in zip(x.shape[1:3], weight.shape[2:], strict=True)]
    shifted = [
        x[:, i : last[0] + i : stride[0], j : last[1] + j : stride[1]]
        for i in range(weight.shape[2])
        for j in range(weight.shape[3])
    ]
    rows = torch.cat(shifted, dim=-1)  # (N, height, width, hwC)
    return F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)
