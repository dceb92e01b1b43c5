"""LeNet: two unpadded 5×5 convolutions and three linear layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from refusals import Refusal


class LeNet(nn.Module):
    """LeNet with ReLU, and a 2×2 max-pool after each convolution, for images from 16×16 (9×9 without pooling).

    Without pooling (the ablation) both max-pools are left out and nothing takes their place. The source does not say
    how the sizes then change: here the convolutions stay unpadded with stride 1, so the sizes go 32→28→24, and only
    the first linear layer grows, from 16·5·5 to 16·24·24 inputs.
    """

    def __init__(self, num_channels: int = 3, num_classes: int = 10, *, image_size: int = 32, pooling: bool = True):
        super().__init__()
        least, ablated = (16, "") if pooling else (9, " without pooling")
        if image_size < least:
            raise Refusal(f"LeNet{ablated} needs images of at least {least}x{least}, got image_size={image_size}")
        side = ((image_size - 4) // 2 - 4) // 2 if pooling else image_size - 8
        self.conv1 = nn.Conv2d(num_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2) if pooling else nn.Identity()
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to logits (N, num_classes)."""
        x = F.relu(self.pool(self.conv1(x)))  # (N, 6, 28, 28) -> (N, 6, 14, 14); ReLU and max-pool commute
        x = F.relu(self.pool(self.conv2(x)))  # (N, 16, 10, 10) -> (N, 16, 5, 5); without pooling (N, 16, 24, 24)
        x = F.relu(self.fc1(x.flatten(1)))  # (N, 120), from 400 inputs; without pooling from 9216
        x = F.relu(self.fc2(x))  # (N, 84)
        return self.fc3(x)
