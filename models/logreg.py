"""Logistic regression: one linear layer on the flattened image."""

from torch import Tensor, nn


class LogReg(nn.Module):
    """f(x) = W x + b, with PyTorch's default initialisation: U(-1/√D, 1/√D) for D = C·H·W inputs."""

    def __init__(self, input_dim: int = 32 * 32, num_classes: int = 10):
        super().__init__()
        self.output_fc = nn.Linear(input_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (N, ...) of D values each to logits (N, num_classes)."""
        return self.output_fc(x.flatten(1))
