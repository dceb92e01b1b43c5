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


def tiny(change=lambda model: None, **sizes):
    """A factory of such networks, of these sizes whatever is asked for, each changed in place."""

    def build():
        model = Tiny(**sizes)
        change(model)
        return model

    return build


plain = Tiny
ten_outputs = tiny(num_classes=10)
two_colour_classes = tiny(num_channels=3, num_classes=2, image_size=32)
reparametrised_head = tiny(lambda model: nn.utils.parametrizations.weight_norm(model.head))
zero_head = tiny(lambda model: nn.init.zeros_(model.head.weight))  # as torchvision's vision transformers start
positive_head = tiny(lambda model: nn.init.uniform_(model.head.weight, 0, 0.1), features=256)
nan_head = tiny(lambda model: nn.init.constant_(model.head.weight, torch.nan))
nan_trunk = tiny(lambda model: nn.init.constant_(model.conv.weight, torch.nan))


class TiedWeights(Tiny):
    """The head's weights are also those of a gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 1)
        self.gate.weight = self.head.weight

    def forward(self, x):
        """Map images (N, 1, 8, 8) to (N, 1)."""
        h = self.features(x)
        return self.head(h * self.gate(h).sigmoid())


class UsedTwice(Tiny):
    """The head is its own gate."""

    def forward(self, x):
        """Map images (N, C, S, S) to (N, 1)."""
        h = self.features(x)
        return self.head(h * self.head(h).sigmoid())


class Cosine(nn.Linear):
    """The cosines between the features and the rows of the weights: no linear layer, whatever its base class."""

    def forward(self, h):
        """Map features (N, F) to (N, num_classes)."""
        return nn.functional.linear(nn.functional.normalize(h), nn.functional.normalize(self.weight))


class MeanOfTokens(nn.Module):
    """The head looks at each token, (N, tokens, 8) -> (N, tokens, 1)."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        """Map images (N, 1, 8, 8) to (N, 1)."""
        return self.head(x.flatten(1).unflatten(1, (-1, 8))).mean(1)


def ends_in_cosine():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Cosine(16, 1))


def ends_in_hook():
    model = Tiny()
    model.head.register_forward_pre_hook(lambda _, inputs: nn.functional.normalize(inputs[0]))
    return model


def ends_in_convolution():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 6), nn.Flatten())


def ends_in_relu():
    return nn.Sequential(Tiny(), nn.ReLU(inplace=True))


def ends_in_clamp():
    return nn.Sequential(Tiny(), nn.Hardtanh(-100, 100))
