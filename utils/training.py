"""Training and evaluation by the recipe of the paper, on tensors that live on the device."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from refusals import Refusal
from utils import files, workers
from utils.layout import layout_of
from utils.precision import as_graphs, autocast, set_fp32

PROGRESS_AFTER_SECONDS = 5.0  # of a training, before it shows its epochs
LOSS_WINDOW = 20  # batches over which the loss is averaged, to see whether it is small


def learning_rate(max_lr: float, epoch: int, step: int, steps: int, epochs: int) -> float:
    """The rate of step `step` (from 0): max_lr·(1 − t/epochs) with t = epoch + (step + 1)/steps."""
    return max_lr * (1 - (epoch + (step + 1) / steps) / epochs)


def train(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    max_lr: float,
    momentum: float,
    weight_decay: float,
    clip_norm: float,
    generator: torch.Generator,
    precision: str = "fp32",
    tests: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    until_loss: float | None = None,
    checkpoint: Path | None = None,
) -> list[dict[str, float]]:
    """Train on images (n, C, H, W) and labels (n,) by a recipe of the paper, all on one device.

    SGD, each epoch in a fresh order with the short last batch kept, the learning rate falling linearly from `max_lr` to
    0, the norm of the gradient of all parameters together clipped. After an epoch, at most once a minute, the state
    goes to `checkpoint`, and is continued from if it is there.

    With `until_loss` the learning rate is constant, and training ends with the epoch in which the mean loss of
    LOSS_WINDOW batches fell below it.

    Returns the history, one dict per epoch: epoch, loss and train_accuracy (%) over the batches as they were trained
    on, NAME_accuracy (%) of each of the `tests`, and with `until_loss` the steps that it took, or nan. It ends early,
    with a loss that is not finite, when training diverges.
    """
    set_fp32(precision, images.device)
    model.to(memory_format=(layout := layout_of(model)))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=max_lr, momentum=momentum, weight_decay=weight_decay)
    history, losses = load_epochs(checkpoint, model, optimizer, generator)
    fast = as_graphs(model.train(), images[:batch_size], precision) if images.is_cuda else model
    bar = {"desc": "epochs", "initial": len(history), "total": epochs, "leave": False, "delay": PROGRESS_AFTER_SECONDS}
    saved = time.monotonic()
    for epoch in tqdm(range(len(history), epochs), disable=not workers.speaks(), **bar):
        if history and not (math.isfinite(history[-1]["loss"]) and math.isnan(history[-1].get("steps", math.nan))):
            break
        model.train()
        batches = torch.randperm(len(images), generator=generator, device=images.device).split(batch_size)
        total_loss = torch.zeros((), device=images.device)  # no step waits for the device
        num_correct = torch.zeros_like(total_loss, dtype=torch.int64)
        with autocast(precision, images.device):
            for step, batch in enumerate(batches):
                rate = max_lr if until_loss else learning_rate(max_lr, epoch, step, len(batches), epochs)
                optimizer.param_groups[0]["lr"] = rate
                network = fast if len(batch) == batch_size else model
                logits = network(images[batch].contiguous(memory_format=layout))
                loss = F.cross_entropy(logits, labels[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimizer.step()
                total_loss += loss.detach() * len(batch)
                losses += [loss.detach()] if until_loss else []
                num_correct += (logits.detach().argmax(1) == labels[batch]).sum()
        # oneDNN's max-pool passes over a nan, so that the loss alone may look sound.
        sound = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
        loss = total_loss.masked_fill(~sound, math.nan).item() / len(images)
        history.append({"epoch": epoch, "loss": loss, "train_accuracy": 100 * num_correct.item() / len(images)})
        for name, test_set in (tests or {}).items():
            history[-1][f"{name}_accuracy"] = evaluate(model, *test_set, precision=precision)
        if until_loss:
            history[-1]["steps"] = first_step_below(torch.stack(losses).cpu(), until_loss)
        if checkpoint and time.monotonic() - saved > files.CHECKPOINT_SECONDS:
            save_epochs(checkpoint, model, optimizer, generator, history, losses)
            saved = time.monotonic()
    return history


def first_step_below(losses: torch.Tensor, limit: float) -> float:
    """The first step, counted from 1, by which the mean of the last LOSS_WINDOW of the losses (n,) is below; or nan."""
    if len(losses) < LOSS_WINDOW:
        return math.nan
    below = (losses.unfold(0, LOSS_WINDOW, 1).mean(1) < limit).nonzero()
    return float(below[0].item() + LOSS_WINDOW) if len(below) else math.nan


@torch.no_grad()
def evaluate(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, precision: str = "fp32", batch_size: int = 500
) -> float:
    """Accuracy in percent of `model` in evaluation mode, over images (n, C, H, W)."""
    set_fp32(precision, images.device)
    layout = layout_of(model)
    model.eval()
    num_correct = torch.zeros((), device=images.device, dtype=torch.int64)
    with autocast(precision, images.device):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            num_correct += (model(x.contiguous(memory_format=layout)).argmax(1) == y).sum()
    return 100 * num_correct.item() / len(images)


def save_epochs(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    history: list[dict[str, float]],
    losses: list[torch.Tensor],
) -> None:
    """Write all that the remaining epochs depend on: weights, optimiser, both generators, history and losses."""
    cuda = torch.cuda.get_rng_state(order.device) if order.device.type == "cuda" else torch.empty(0)
    generators = {"order": order.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generators": generators}
    files.save_checkpoint(path, state | {"history": history, "losses": torch.tensor(losses)})


def load_epochs(
    path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator
) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """Continue from what `save_epochs` wrote, if it is there; return the history and the losses so far."""
    if path is None or not path.exists():
        return [], []
    state = files.load_checkpoint(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["generators"]["order"])
        torch.set_rng_state(state["generators"]["cpu"])
        if order.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"], order.device)
        return state["history"], list(state["losses"].to(order.device))
    except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise Refusal(f"the checkpoint {path} does not fit ({reason}): delete it to start again") from None
