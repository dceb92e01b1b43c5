"""The plain way to do each experiment, to measure against: what one would write first."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def train_plainly(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, **recipe: float) -> None:
    """The recipe of `utils.training.train`, fed by a DataLoader with 2 workers, two `.item()` each step."""
    device, data = next(model.parameters()).device, TensorDataset(images, labels)
    max_lr, epochs = recipe["max_lr"], recipe["epochs"]
    loader = DataLoader(data, recipe["batch_size"], shuffle=True, num_workers=2, pin_memory=device.type == "cuda")
    options = {name: recipe[name] for name in ("momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), lr=max_lr, **options)
    model.train()
    running_loss, running_correct = 0.0, 0
    for epoch in range(epochs):
        for step, (x, y) in enumerate(loader):
            x, y = x.to(device), y.to(device)
            for group in optimizer.param_groups:
                group["lr"] = max_lr * (1 - (epoch + (step + 1) / len(loader)) / epochs)
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
            optimizer.step()
            running_loss += loss.item()
            running_correct += (logits.argmax(1) == y).sum().item()


def gradient_plainly(model: nn.Module, point: torch.Tensor, *, step: float = 100.0, pixels: int) -> torch.Tensor:
    """Central differences of a network of one output along its first pixels: two batches, autograd's graph left on."""
    shifts = step * torch.eye(point.numel(), device=point.device)[:pixels].view(-1, *point.shape)
    up, down = model(point + shifts), model(point - shifts)
    return (up - down).flatten() / (2 * step)
