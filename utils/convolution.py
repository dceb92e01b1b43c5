"""Convolutions of small images, each as one matrix product: for training in bf16 on a CPU.

oneDNN works along the rows of an image, in tiles that an output of 4×4 pixels or less leaves nearly empty: the last
layers of a network take half of its time. As a product they take a tenth to a half of that.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MAX_PIXELS = 16  # of the output; at 8×8, oneDNN's convolution is as fast


class SmallConvolutions(TorchFunctionMode):
    """Within it, every convolution of a layer without groups and dilation with a small output is a matrix product."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        """Do what was called, or the product instead."""
        if function is torch.conv2d and len(arguments) == 7 and arguments[5:] == ((1, 1), 1):
            x, weight, bias, stride, padding = arguments[:5]
            if x.ndim == 4 and not isinstance(padding, str):
                h, w = (
                    (side + 2 * pad - kernel) // step + 1
                    for side, pad, kernel, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
                )
                if 0 < h * w <= MAX_PIXELS:
                    return convolution_as_product(x, weight, bias, stride, padding)
        return function(*arguments, **(keywords or {}))


def convolution_as_product(x, weight, bias, stride, padding):
    """`F.conv2d` of x (N, C, H, W) with weight (O, C, k, l): one row per output pixel, the k·l·C values it sums over."""
    (s, t), (p, q) = stride, padding
    k, l = weight.shape[2:]  # noqa: E741
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, q, q, p, p))
    h, w = (x.shape[1] - k) // s + 1, (x.shape[2] - l) // t + 1
    rows = torch.cat([x[:, i : i + s * h : s, j : j + t * w : t] for i in range(k) for j in range(l)], dim=-1)
    return F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)  # (N, O, h, w)
