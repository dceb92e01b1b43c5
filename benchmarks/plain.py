"""The plain way to do each experiment, to measure against: what one would write first."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from models import LeNet


class TextbookLeNet(LeNet):
    """LeNet as one writes it first: the ReLU before the pool, on four times as many values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, 32, 32) to logits (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def train_plainly(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epochs: int, batch_size: int, max_lr: float,
    momentum: float, weight_decay: float, clip_norm: float, max_steps: int | None = None,
) -> int:  # fmt: skip
    """The recipe of `utils.training.train_epoch`, fed by a DataLoader with 2 workers, an `.item()` each step.

    Returns:
        The number of images trained on.
    """
    loader = DataLoader(
        TensorDataset(images, labels), batch_size, shuffle=True, num_workers=2, pin_memory=torch.cuda.is_available()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=max_lr, momentum=momentum, weight_decay=weight_decay)
    device = next(model.parameters()).device
    model.train()
    seen, running_loss, running_correct, steps = 0, 0.0, 0, 0
    for epoch in range(epochs):
        for batch, (x, y) in enumerate(loader):
            x, y = x.to(device), y.to(device)
            for group in optimizer.param_groups:
                group["lr"] = max_lr * (1 - (epoch + (batch + 1) / len(loader)) / epochs)
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            running_loss += loss.item()
            running_correct += (logits.argmax(1) == y).sum().item()
            seen += len(y)
            steps += 1
            if steps == max_steps:
                return seen
    return seen


def gradient_plainly(
    model: nn.Module, point: torch.Tensor, step: float = 100.0, pixels: int | None = None
) -> torch.Tensor:
    """Central differences of a network of one output: all shifted images in one batch, autograd's graph left on.

    With `pixels`, only of so many, where the batch of all is too large for the machine.
    """
    shifts = step * torch.eye(point.numel(), device=point.device)[:pixels].view(-1, *point.shape)
    up, down = model(point + shifts), model(point - shifts)
    return (up - down).flatten() / (2 * step)
