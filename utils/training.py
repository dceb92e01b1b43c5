"""Training and evaluation on tensors that live on the device, by the recipe of the paper."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import autograd, backends, nn
from torch.nn import functional as F
from tqdm import tqdm

from utils import distributed, files, runs
from utils.convolution import small_convolutions_as_products

PATIENCE = 5.0  # seconds after which a training shows its epochs
PRECISIONS = ("fp32", "tf32", "bf16")
SWITCHES = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)


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
    before = [switch.fp32_precision for switch in SWITCHES]
    _set_switches(*["tf32" if precision == "tf32" else "ieee"] * len(SWITCHES))
    try:
        # Without autocast's cache: it keeps the rounded weights, and steps within the block change the weights.
        rounded = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        on_cpu = precision == "bf16" and device.type == "cpu"
        with rounded, small_convolutions_as_products() if on_cpu else contextlib.nullcontext():
            yield
    finally:
        _set_switches(*before)


def _set_switches(matmul: str, on_cpu: str, conv: str, rnn: str) -> None:
    """Set SWITCHES, and before them torch's older flags: reading one that disagrees raises."""
    torch.set_float32_matmul_precision("medium" if on_cpu == "bf16" else "high" if matmul == "tf32" else "highest")
    backends.cudnn.allow_tf32 = conv == "tf32"
    for switch, value in zip(SWITCHES, (matmul, on_cpu, conv, rnn), strict=True):
        switch.fp32_precision = value


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
    checkpoint: Path | None = None,
) -> list[dict[str, float]]:
    """Train on images (n, C, H, W) and labels (n,) by a recipe of the paper, all on one device.

    SGD, each epoch in a fresh order with the short last batch kept, the rate falling linearly from `max_lr` to 0, the
    norm of the gradient of all parameters together clipped. After an epoch, at most once a minute, the state goes to
    `checkpoint`, and is continued from if it is there.

    Returns the history, one dict per epoch: epoch, loss and train_accuracy (%) over the batches as they were trained
    on, and NAME_accuracy (%) of each of the `tests`, images and labels by name. It ends early, with a loss that is not
    finite, when it diverges.
    """
    model.to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=max_lr, momentum=momentum, weight_decay=weight_decay)
    history = load_epochs(checkpoint, model, optimizer, generator) if checkpoint else []
    fast = as_graphs(model.train(), images[:batch_size], precision) if images.is_cuda else model
    bar = {"desc": "epochs", "initial": len(history), "total": epochs, "leave": False, "delay": PATIENCE}
    saved = time.monotonic()
    for epoch in tqdm(range(len(history), epochs), disable=distributed.rank() > 0, **bar):
        if history and not math.isfinite(history[-1]["loss"]):
            break
        model.train()
        batches = torch.randperm(len(images), generator=generator, device=images.device).split(batch_size)
        total_loss = torch.zeros((), device=images.device)  # no step waits for the device
        num_correct = torch.zeros((), device=images.device, dtype=torch.int64)
        with precision_mode(precision, images.device):
            for step, batch in enumerate(batches):
                optimizer.param_groups[0]["lr"] = learning_rate(max_lr, epoch, step, len(batches), epochs)
                network = fast if len(batch) == batch_size else model
                logits = network(images[batch].contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimizer.step()
                total_loss += loss.detach() * len(batch)
                num_correct += (logits.detach().argmax(1) == labels[batch]).sum()
        # oneDNN's max-pool passes over a nan, so that the loss alone may look sound.
        sound = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
        loss = total_loss.masked_fill(~sound, math.nan).item() / len(images)
        history.append({"epoch": epoch, "loss": loss, "train_accuracy": 100 * num_correct.item() / len(images)})
        for name, test_set in (tests or {}).items():
            history[-1][f"{name}_accuracy"] = evaluate(model, *test_set, precision=precision)
        if checkpoint and time.monotonic() - saved > runs.CHECKPOINT_SECONDS:
            save_epochs(checkpoint, model, optimizer, generator, history)
            saved = time.monotonic()
    return history


def as_graphs(model: nn.Module, images: torch.Tensor, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward and backward pass of a model, for images of this shape, as CUDA graphs: the same kernels, one launch.

    A graph repeats what Python decided once: a model with parts from elsewhere than here and torch comes back as it is.
    """
    if {type(part).__module__.split(".")[0] for part in model.modules()} != {"models", "torch"}:
        return model
    gc.collect()  # the graphs of an earlier network are in a reference cycle, and hold memory
    before = {name: value.clone() for name, value in model.state_dict().items()}  # a warm-up changes statistics
    sample = images.contiguous(memory_format=torch.channels_last).clone()  # each batch is copied into this one
    autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # autograd waits for the recording's stream
    here = torch.cuda.stream(torch.cuda.current_stream(images.device))  # not on the first GPU, but on this one
    with here, precision_mode(precision, images.device), torch.random.fork_rng([images.device]):
        graphs = torch.cuda.make_graphed_callables(nn.Sequential(model), (sample,))
    model.load_state_dict(before)
    return graphs


@torch.no_grad()
def evaluate(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, precision: str = "fp32", batch_size: int = 500
) -> float:
    """Accuracy in percent of `model` in evaluation mode, over images (n, C, H, W)."""
    model.eval()
    num_correct = torch.zeros((), device=images.device, dtype=torch.int64)
    with precision_mode(precision, images.device):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(x.contiguous(memory_format=torch.channels_last))
            num_correct += (logits.argmax(1) == y).sum()
    return 100 * num_correct.item() / len(images)


def save_epochs(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator, history: list[dict]
) -> None:
    """Write all that the remaining epochs depend on: weights, optimiser, both generators, and the history."""
    cuda = torch.cuda.get_rng_state(order.device) if order.device.type == "cuda" else torch.empty(0)
    generators = {"order": order.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    files.save_checkpoint(path, state | {"generators": generators, "history": history})


def load_epochs(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator
) -> list[dict[str, float]]:
    """Continue from what `save_epochs` wrote, if it is there; return the history so far."""
    if not path.exists():
        return []
    state = files.load_checkpoint(path)
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
