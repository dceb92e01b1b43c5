"""Training and evaluation on tensors that live on the device, by the recipe of the paper."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from utils import distributed, runs

PATIENCE = 5.0  # seconds after which a training shows its epochs
PRECISIONS = ("fp32", "tf32", "bf16")


@contextlib.contextmanager
def precision_mode(precision: str, device: torch.device | str) -> Iterator[None]:
    """Arithmetic of the forward and backward pass: fp32 (really), tf32 (CUDA only), or bf16 autocast.

    torch lets cuDNN round fp32 convolutions to TF32 unless told otherwise; fp32 here tells it.
    """
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown: expected one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 needs a CUDA device, not {device}")
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        # Without autocast's cache: it keeps the rounded weights, and steps within the block change the weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def logits_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The logits (N, classes) of images x (N, C, H, W), laid out in memory as suits the model and the device.

    That is channels_last. On a CPU with AVX-512, where a vector is 16 floats, it is oneDNN's blocks of 16 channels for
    a model whose class says, by an attribute `takes_mkldnn`, that it can be given them and gains.
    """
    blocks = (
        vars(type(model)).get("takes_mkldnn", False)  # not inherited: a subclass may have a forward of its own
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.is_autocast_enabled("cpu")
    )
    return model(x.to_mkldnn() if blocks else x.contiguous(memory_format=torch.channels_last))


def learning_rate(max_lr: float, epoch: int, step: int, steps: int, epochs: int) -> float:
    """The rate of step `step` (from 0): max_lr·(1 − t/epochs) with t = epoch + (step + 1)/steps."""
    return max_lr * (1 - (epoch + (step + 1) / steps) / epochs)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epoch: int,
    epochs: int,
    batch_size: int,
    max_lr: float,
    clip_norm: float,
    generator: torch.Generator,
    precision: str = "fp32",
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
) -> tuple[float, float]:
    """One pass over the data in a fresh order, the short last batch kept; no step waits for the device.

    Args:
        model: on the device of the images; set to training mode.
        optimizer: SGD over the model's parameters; its rate is set before each step.
        images: (n, C, H, W).
        labels: (n,), int64.
        epoch: number of this epoch, from 0.
        epochs: number of epochs after which the rate is 0.
        batch_size: samples a step.
        max_lr: rate at the start of training.
        clip_norm: bound on the norm of the gradient of all parameters together.
        generator: source of the order, on the device of the images.
        precision: see `precision_mode`.
        augment: maps a batch to a batch; draws from `generator`.

    Returns:
        Mean loss and accuracy in percent, over the batches as they were trained on. The loss is nan where a parameter
        is not finite.
    """
    model.train()
    parameters = list(model.parameters())
    order = torch.randperm(len(images), generator=generator, device=images.device)
    batches = order.split(batch_size)
    total_loss = torch.zeros((), device=images.device)
    num_correct = torch.zeros((), device=images.device, dtype=torch.int64)
    with precision_mode(precision, images.device):
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(max_lr, epoch, step, len(batches), epochs)
            x, y = images[batch], labels[batch]
            if augment is not None:
                x = augment(x, generator)
            logits = logits_of(model, x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            total_loss += loss.detach() * len(batch)
            num_correct += (logits.detach().argmax(1) == y).sum()
    # oneDNN's max-pool passes over a nan, so that the loss alone may look sound.
    sound = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
    total_loss.masked_fill_(~sound, math.nan)
    return total_loss.item() / len(images), 100 * num_correct.item() / len(images)


def make_optimizer(
    model: nn.Module, *, max_lr: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> torch.optim.SGD:
    """The paper's optimiser; `train_epoch` sets the rate of each step."""
    return torch.optim.SGD(model.parameters(), lr=max_lr, momentum=momentum, weight_decay=weight_decay)


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epochs: int = 20, batch_size: int = 128,
    max_lr: float = 0.5, momentum: float = 0.0, weight_decay: float = 0.0, clip_norm: float = 0.5,
    generator: torch.Generator, precision: str = "fp32",
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
    tests: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None, checkpoint: Path | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train by the recipe of the paper, by default that of its first experiment.

    The arguments are those of `train_epoch` and `make_optimizer`, and two more: `tests`, images and labels by a name,
    are evaluated after each epoch; `checkpoint`, a file, is written after each epoch and continued from if it is there.

    Returns:
        The history, one dict an epoch: epoch, loss, train_accuracy, and NAME_accuracy of each of the tests (%).
        It ends early, with the epoch whose loss is not finite, when training diverges.
    """
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, max_lr=max_lr, momentum=momentum, weight_decay=weight_decay)
    history = load_epochs(checkpoint, model, optimizer, generator) if checkpoint else []
    left = range(len(history), epochs)
    bar = {"desc": "epochs", "initial": len(history), "total": epochs, "leave": False, "delay": PATIENCE}
    for epoch in tqdm(left, disable=distributed.rank() > 0, **bar):
        if history and not math.isfinite(history[-1]["loss"]):
            break
        loss, accuracy = train_epoch(
            model, optimizer, images, labels, epoch=epoch, epochs=epochs, batch_size=batch_size, max_lr=max_lr,
            clip_norm=clip_norm, generator=generator, precision=precision, augment=augment,
        )  # fmt: skip
        history.append({"epoch": epoch, "loss": loss, "train_accuracy": accuracy})
        for name, test_set in (tests or {}).items():
            history[-1][f"{name}_accuracy"] = evaluate(model, *test_set, precision=precision)
        if checkpoint:
            save_epochs(checkpoint, model, optimizer, generator, history)
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    precision: str = "fp32",
    batch_size: int = 500,
) -> float:
    """Accuracy in percent of `model` in evaluation mode, over images (n, C, H, W)."""
    model.eval()
    num_correct = torch.zeros((), device=images.device, dtype=torch.int64)
    with precision_mode(precision, images.device):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            num_correct += (logits_of(model, x).argmax(1) == y).sum()
    return 100 * num_correct.item() / len(images)


def save_epochs(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator, history: list[dict]
) -> None:
    """Write all that the remaining epochs depend on: weights, optimiser, both generators, and the history."""
    cuda = torch.cuda.get_rng_state(order.device) if order.device.type == "cuda" else torch.empty(0)
    generators = {"order": order.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    runs.save_checkpoint(path, state | {"generators": generators, "history": history})


def load_epochs(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator
) -> list[dict[str, float]]:
    """Continue from what `save_epochs` wrote, if it is there; return the history so far."""
    if not path.exists():
        return []
    state = runs.load_checkpoint(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["generators"]["order"])
        torch.set_rng_state(state["generators"]["cpu"])
        if order.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"], order.device)
        return state["history"]
    except (LookupError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the checkpoint {path} does not fit ({reason}): delete it to start again") from None
