"""ResNet-18 for 32×32 images: a 3×3 stem and no max-pool."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3×3 convolutions, the first with `stride`.

    The shortcut is a 1×1 convolution with batch norm where the number of channels changes, which it does wherever the
    stride is 2; elsewhere it is the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, S, S) to (N, out_channels, S/stride, S/stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNet18(nn.Module):
    """ResNet-18: two blocks each of 64, 128, 256 and 512 channels, then an average over all positions.

    Without pooling (the ablation) every stride is 1 and the average is left out: the linear layer sees all 512·S·S
    values, and only it depends on `image_size`. The source does not say what becomes of the shortcuts. Here they stay,
    with stride 1, and the state-dict keys are the same.
    """

    def __init__(self, num_channels: int = 3, num_classes: int = 10, *, image_size: int = 32, pooling: bool = True):
        super().__init__()
        stride = 2 if pooling else 1
        self.pooling = pooling
        self.conv1 = nn.Conv2d(num_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride), BasicBlock(512, 512, 1))
        self.linear = nn.Linear(512 if pooling else 512 * image_size * image_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, 64, 32, 32)
        x = self.layer2(self.layer1(x))  # (N, 128, 16, 16); without pooling every size stays 32×32
        x = self.layer4(self.layer3(x))  # (N, 512, 4, 4)
        if self.pooling:
            x = F.adaptive_avg_pool2d(x, 1)  # (N, 512, 1, 1)
        return self.linear(x.flatten(1))
