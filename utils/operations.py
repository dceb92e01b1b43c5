"""Counting the arithmetic of a model."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def forward_flops(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Floating-point operations (two a multiply-add) of a forward pass of one image (C, H, W)."""
    parameter = next(model.parameters())
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
    return counter.get_total_flops()
