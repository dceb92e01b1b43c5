"""VGG-11 for 32×32 images, with a batch norm after each convolution."""

import math

from torch import Tensor, nn

from refusals import Refusal

GROUPS = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # channels of 3×3 convolutions; a max-pool ends each group


class VGG11_bn(nn.Module):
    """VGG-11 with batch norm, and three linear layers of 512 hidden units with dropout.

    Convolution weights are drawn from N(0, 2/(k²·out_channels)), and their biases are 0. The linear layers keep
    PyTorch's default initialisation.

    The source has 32×32 images only. Of a larger one the first linear layer sees all ⌊S/32⌋ × ⌊S/32⌋ positions.
    """

    def __init__(self, num_channels: int = 3, num_classes: int = 10, *, image_size: int = 32):
        super().__init__()
        if image_size < 32:
            raise Refusal(f"VGG-11 needs images of at least 32x32, got image_size={image_size}")
        layers: list[nn.Module] = []
        for group in GROUPS:
            for channels in group:
                convolution = nn.Conv2d(num_channels, channels, 3, padding=1)
                layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                num_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(512 * (image_size // 32) ** 2, 512), nn.ReLU(), nn.Dropout(0.5)]
        hidden += [nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(512, num_classes))
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (3 * 3 * module.out_channels)))
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to logits (N, num_classes)."""
        return self.classifier(self.features(x).flatten(1))  # features: (N, 512, 1, 1)
