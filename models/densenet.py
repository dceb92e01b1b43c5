"""DenseNet-121 for 32×32 images: a 3×3 stem and no max-pool."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refusals import Refusal


class Bottleneck(nn.Module):
    """Batch norm, ReLU, 1×1 convolution to 4·growth channels; batch norm, ReLU, 3×3 convolution to growth."""

    def __init__(self, in_channels: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, S, S) to (N, growth + C, S, S), the new channels first."""
        new = self.conv1(F.relu(self.bn1(x), inplace=True))  # (N, 4·growth, S, S)
        new = self.conv2(F.relu(self.bn2(new), inplace=True))  # (N, growth, S, S)
        return torch.cat([new, x], dim=1)


class Transition(nn.Module):
    """Batch norm, ReLU, 1×1 convolution, 2×2 average pool."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, S, S) to (N, out_channels, S/2, S/2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True)), 2)


def _dense_block(in_channels: int, depth: int, growth: int = 32) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck(in_channels + i * growth, growth) for i in range(depth)))


class DenseNet121(nn.Module):
    """DenseNet-121: blocks [6, 12, 24, 16], growth 32; each transition halves the channels and the size.

    The source has 32×32 images only. Of a larger one the linear layer sees all ⌊S/32⌋ × ⌊S/32⌋ positions.
    """

    def __init__(self, num_channels: int = 3, num_classes: int = 10, *, image_size: int = 32):
        super().__init__()
        if image_size < 32:
            raise Refusal(f"DenseNet-121 needs images of at least 32x32, got image_size={image_size}")
        self.conv1 = nn.Conv2d(num_channels, 64, 3, padding=1, bias=False)
        self.dense1, self.trans1 = _dense_block(64, 6), Transition(256, 128)
        self.dense2, self.trans2 = _dense_block(128, 12), Transition(512, 256)
        self.dense3, self.trans3 = _dense_block(256, 24), Transition(1024, 512)
        self.dense4, self.bn = _dense_block(512, 16), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024 * (image_size // 32) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to logits (N, num_classes)."""
        x = self.conv1(x)  # (N, 64, 32, 32)
        x = self.trans1(self.dense1(x))  # (N, 256, 32, 32) -> (N, 128, 16, 16)
        x = self.trans2(self.dense2(x))  # (N, 512, 16, 16) -> (N, 256, 8, 8)
        x = self.trans3(self.dense3(x))  # (N, 1024, 8, 8) -> (N, 512, 4, 4)
        x = F.relu(self.bn(self.dense4(x)), inplace=True)  # (N, 1024, 4, 4)
        x = F.avg_pool2d(x, 4)  # (N, 1024, 1, 1)
        return self.linear(x.flatten(1))
