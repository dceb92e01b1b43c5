"""VGG-11 for 32×32 images, with a batch norm after each convolution."""

import math

from torch import Tensor, nn

from refusals import Refusal

# Output channels of the 3×3 convolutions; a max-pool ends each group.
GROUPS = ((64,), (128,), (256, 256), (512, 512), (512, 512))
HIDDEN = 512  # width of the classifier's two hidden layers


class VGG11_bn(nn.Module):
    """VGG-11 with batch norm.

    Convolution weights are drawn from N(0, 2/(k²·out_channels)) and their biases are 0; the linear layers
    keep PyTorch's default initialisation.

    The source has 32×32 images only. For larger ones, the five max-pools leave ⌊S/32⌋ × ⌊S/32⌋ positions, all of
    which enter the first linear layer.
    """

    def __init__(self, num_channels: int = 3, num_classes: int = 10, *, image_size: int = 32):
        super().__init__()
        if image_size < 32:
            raise Refusal(f"VGG-11 needs images of at least 32x32, got image_size={image_size}")
        layers: list[nn.Module] = []
        in_channels = num_channels
        for group in GROUPS:
            for out_channels in group:
                convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
                layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(in_channels * (image_size // 32) ** 2, HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(HIDDEN, num_classes),
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (3 * 3 * module.out_channels)))
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to logits (N, num_classes)."""
        x = self.features(x)  # (N, 512, 1, 1)
        return self.classifier(x.flatten(1))
