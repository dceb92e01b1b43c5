"""Normalisation of the input as the first layer of a network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TransformLayer(nn.Module):
    """(x − mean) / std, with one number for all channels or one a channel.

    The two are buffers, so they follow the module to its device, but they are not part of its state dict: a
    network's weights do not hold the normalisation of its data.

    Args:
        mean: a float, or one a channel.
        std: a float, or one a channel; positive.

    Raises:
        ValueError: a std is not positive, or the two lengths disagree.
    """

    mean: Tensor  # () or (C, 1, 1)
    std: Tensor  # () or (C, 1, 1)

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]):
        super().__init__()
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        if self.mean.ndim and self.std.ndim and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; expected as many")
        if not bool((torch.as_tensor(std, device="cpu") > 0).all()):
            raise ValueError(f"std={std} must be positive")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to normalised images of the same shape."""
        return (x - self.mean) / self.std


def _per_channel(value: float | Sequence[float]) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.get_default_dtype()).clone()
    return tensor.reshape(-1, 1, 1) if tensor.ndim else tensor
