"""Networks small enough to draw by the thousand, and ones that the marginal estimator must refuse.

Named on the command line as tests.tiny_networks:NAME.
"""

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """A strided convolution, ReLU, a linear layer, ReLU, and a linear head."""

    def __init__(self, num_channels: int = 1, num_classes: int = 1, image_size: int = 8, features: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(num_channels, 4, 3, stride=2, padding=1)
        side = (image_size + 1) // 2
        self.body = nn.Linear(4 * side * side, features)
        self.head = nn.Linear(features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to features (N, F)."""
        return self.body(self.conv(x).relu().flatten(1)).relu()

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, S, S) to (N, num_classes)."""
        return self.head(self.features(x))


def plain(num_channels, num_classes, image_size):
    return Tiny(num_channels, num_classes, image_size)


def ten_outputs():
    return Tiny(num_classes=10)


def of_another_size():
    return Tiny(image_size=16)


def reparametrised_head():
    model = Tiny()
    nn.utils.parametrizations.weight_norm(model.head)
    return model


def zero_head():
    """As torchvision's vision transformers start."""
    model = Tiny()
    nn.init.zeros_(model.head.weight)
    return model


def positive_head():
    model = Tiny(features=256)
    nn.init.uniform_(model.head.weight, 0, 0.1)
    return model


def nan_head():
    model = Tiny()
    nn.init.constant_(model.head.weight, torch.nan)
    return model


def nan_trunk():
    model = Tiny()
    nn.init.constant_(model.conv.weight, torch.nan)
    return model


class _Tied(Tiny):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 1)
        self.gate.weight = self.head.weight

    def forward(self, x):
        h = self.features(x)
        return self.head(h * self.gate(h).sigmoid())


def tied_weights():
    return _Tied()


class _Twice(Tiny):
    def forward(self, x):
        h = self.features(x)
        return self.head(h * self.head(h).sigmoid())


def used_twice():
    return _Twice()


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(x.flatten(1).unflatten(1, (-1, 8))).mean(1)  # (N, tokens, 1) -> (N, 1)


def mean_of_tokens():
    return _Tokens()


def ends_in_convolution():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 6), nn.Flatten())


def ends_in_relu():
    return nn.Sequential(Tiny(), nn.ReLU(inplace=True))


def ends_in_clamp():
    return nn.Sequential(Tiny(), nn.Hardtanh(-100, 100))


class _Pair(Tiny):
    def forward(self, x):
        return super().forward(x), x


def returns_a_pair():
    return _Pair()
