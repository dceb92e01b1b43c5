"""The arithmetic of a model, and an estimate of what a run takes."""

import datetime
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import distributed
from utils.training import evaluate, make_optimizer, train_epoch


@torch.no_grad()
def forward_flops(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Floating-point operations (two a multiply-add) of a forward pass of one image (C, H, W).

    Raises:
        ValueError: the network does not take such images, or has no parameters.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"a {type(model).__name__} without parameters has nothing to draw or to train")
    with FlopCounterMode(display=False) as counter:
        try:
            model.eval()(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
        except RuntimeError as error:
            size = "x".join(map(str, shape))
            raise ValueError(f"the network does not take {size} images: {str(error).splitlines()[0]}") from None
    return counter.get_total_flops()


def print_estimate(work: str, *, items: int, done: int, flops_an_item: float, seconds_an_item: float) -> None:
    """Print what a run will take: its work items, their operations, and the time that the ranks at hand need.

    Args:
        work: what an item is, in the plural.
        items: how many are asked for.
        done: how many of them an earlier command has done.
        flops_an_item: operations of one.
        seconds_an_item: seconds that a rank takes for one, while the others work too.
    """
    left, ranks = items - done, distributed.world_size()
    rounds = -(-left // ranks)  # if they are shared evenly
    print(
        f"{items} {work}, {done} of them done; {left} to do on {ranks} rank{'s' * (ranks > 1)}\n"
        f"operations: {flops_an_item:.2e} each, {left * flops_an_item:.2e} in all "
        f"({ranks * flops_an_item / seconds_an_item / 1e9:.3g} GFLOP/s)\n"
        f"estimated time here: {datetime.timedelta(seconds=round(rounds * seconds_an_item))} "
        f"({seconds_an_item:.3g} s each, measured)"
    )


def seconds_per_image(
    model: nn.Module,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    device: torch.device,
    batch_size: int = 128,
    precision: str = "fp32",
    patience: float = 2.0,
) -> tuple[float, float]:
    """Seconds that a step of training, and an evaluation, take an image: measured on random images (C, H, W).

    Args:
        model: it is changed.
        shape: of an image.
        num_classes: number of its outputs.
        device: where to measure.
        batch_size: samples a step.
        precision: see `precision_mode`.
        patience: seconds to measure for, or one pass of two steps if that takes longer.
    """
    model.to(device, memory_format=torch.channels_last)
    images = torch.randn(2 * batch_size, *shape, device=device)
    labels = torch.randint(num_classes, (len(images),), device=device)
    optimizer = make_optimizer(model, max_lr=1e-3)
    generator = torch.Generator(device)

    def train_once() -> None:
        train_epoch(
            model, optimizer, images, labels, epoch=0, epochs=1, batch_size=batch_size, max_lr=1e-3, clip_norm=0.5,
            generator=generator, precision=precision,
        )  # fmt: skip

    def seconds_of(work: Callable[[], object]) -> float:
        work()  # the first time chooses algorithms and touches memory
        start, passes = time.perf_counter(), 0
        while passes == 0 or time.perf_counter() - start < patience / 2:
            work()  # ends with `.item()`, so the device has finished
            passes += 1
        return (time.perf_counter() - start) / passes / len(images)

    return seconds_of(train_once), seconds_of(lambda: evaluate(model, images, labels, precision=precision))


def print_training_estimate(
    model: nn.Module, shape: tuple[int, int, int], num_classes: int, *, num_trained: int, num_tested: int, items: int,
    done: int, **options: Any,
) -> None:  # fmt: skip
    """Print what so many trainings take, each of `num_trained` images seen in training and `num_tested` in tests.

    Args:
        model: the network that is trained; it is changed.
        shape: of an image.
        num_classes: number of outputs.
        num_trained: images of all epochs of one training.
        num_tested: images of all tests of one training.
        items: trainings asked for.
        done: how many of them an earlier command has done.
        options: device, batch_size, precision.
    """
    flops = forward_flops(model, shape) * (3 * num_trained + num_tested)  # a backward pass is two forward passes
    training, testing = seconds_per_image(model, shape, num_classes, **options)
    if distributed.rank() == 0:
        print_estimate(
            "trainings", items=items, done=done, flops_an_item=flops,
            seconds_an_item=training * num_trained + testing * num_tested,
        )  # fmt: skip
