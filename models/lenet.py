"""LeNet: two unpadded 5×5 convolutions and three linear layers."""

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet with ReLU, and a 2×2 max-pool after each convolution.

    Without pooling (the ablation) both max-pools are left out and nothing takes their place. The source does
    not say how the sizes then change: here the convolutions stay unpadded with stride 1, so the sizes go
    32→28→24, and only the first linear layer grows, from 16·5·5 to 16·24·24 inputs.

    Args:
        num_channels: channels of the input images.
        num_classes: number of outputs.
        image_size: height and width of the input images; at least 16, or 9 without pooling.
        pooling: False for the ablation.

    Raises:
        ValueError: the image is too small for the layers.
    """

    # 6 channels do not vectorise; oneDNN's own layout pads them to 16, see `utils.training.logits_of`. Its pools need
    # their stride given, and it ends before the linear layers.
    takes_mkldnn = True

    def __init__(self, num_channels: int = 3, num_classes: int = 10, *, image_size: int = 32, pooling: bool = True):
        super().__init__()
        smallest = 16 if pooling else 9
        if image_size < smallest:
            name = "LeNet" if pooling else "LeNet without pooling"
            raise ValueError(f"{name} needs images of at least {smallest}x{smallest}, got image_size={image_size}")
        side = ((image_size - 4) // 2 - 4) // 2 if pooling else image_size - 8
        self.pooling = pooling
        self.conv1 = nn.Conv2d(num_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to logits (N, num_classes)."""
        # Pooling before the ReLU is the same function (both are monotone) for a quarter of the ReLU's work.
        x = self.conv1(x)  # (N, 6, 28, 28)
        x = F.relu(F.max_pool2d(x, 2, 2) if self.pooling else x)  # (N, 6, 14, 14)
        x = self.conv2(x)  # (N, 16, 10, 10); without pooling (N, 16, 24, 24)
        x = F.relu(F.max_pool2d(x, 2, 2) if self.pooling else x)  # (N, 16, 5, 5)
        x = (x.to_dense() if x.is_mkldnn else x).flatten(1)  # (N, 400); without pooling (N, 9216)
        x = F.relu(self.fc1(x))  # (N, 120)
        x = F.relu(self.fc2(x))  # (N, 84)
        return self.fc3(x)
