"""Convolutions with a small output of many channels, each as one matrix product, in bf16 on a CPU.

oneDNN's tiles are nearly empty at the 2×2 and 4×4 pixels of the last layers of VGG-11 and ResNet-18. What a training
gains, on an Intel Xeon with AMX: results/benchmarks.md.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

MAX_PIXELS, MIN_CHANNELS = 16, 256  # of an output that a product gives faster


@contextlib.contextmanager
def small_convolutions_as_products() -> Iterator[None]:
    """Within it, a plain `nn.Conv2d`, without groups and dilation, is a product where that is faster."""
    convolve = nn.Conv2d.forward

    def forward(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return product(layer, x) if _is_small(layer, x) else convolve(layer, x)

    nn.Conv2d.forward = forward
    try:
        yield
    finally:
        nn.Conv2d.forward = convolve


def _is_small(layer: nn.Conv2d, x: torch.Tensor) -> bool:
    plain = (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros") and type(layer) is nn.Conv2d
    if not plain or isinstance(layer.padding, str) or layer.out_channels < MIN_CHANNELS or x.ndim != 4:
        return False
    geometry = zip(x.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=True)
    height, width = ((side + 2 * pad - kernel) // step + 1 for side, pad, kernel, step in geometry)
    return height > 0 and width > 0 and height * width <= MAX_PIXELS


def product(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The convolution of images (N, C, H, W): a row of all that each output pixel sums over, times the weights."""
    (p, q), (s, t), (k, l) = layer.padding, layer.stride, layer.kernel_size  # noqa: E741
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, q, q, p, p))
    bottom, right = x.shape[1] - k + 1, x.shape[2] - l + 1
    shifted = [x[:, i : bottom + i : s, j : right + j : t] for i in range(k) for j in range(l)]
    rows = torch.cat(shifted, dim=-1)  # (N, h, w, klC)
    return F.linear(rows, layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias).permute(0, 3, 1, 2)
