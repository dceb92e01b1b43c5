"""Checks of a network, once before a run: `build` draws one, for images of shape (C, S, S)."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.libraries import refusing
from models.registry import is_users
from refusals import Refusal


def checked(
    build: Callable[[], nn.Module],
    arch: str | Callable[..., nn.Module],
    image_shape: tuple[int, ...],
    num_classes: int,
    *,
    last_batch: int | None = None,
) -> nn.Module:
    """A network that `build` draws, once all checks are passed: also those of training, given an epoch's last batch."""
    model = build()
    check_model(model, arch, image_shape, num_classes)
    check_fresh_draws(build, image_shape)
    if last_batch is not None:
        check_training_step(build, image_shape, num_classes, last_batch=last_batch)
    return model


def check_model(
    model: nn.Module, arch: str | Callable[..., nn.Module], image_shape: tuple[int, ...], num_classes: int
) -> None:
    """Refuse a network that does not give a value for each class of a blank image. It is left in training mode."""
    if next(model.parameters(), None) is None:
        raise Refusal(f"a {type(model).__name__} without parameters has nothing to draw or to train")
    takes = f"the network does not take {'x'.join(map(str, image_shape))} images"
    with torch.no_grad(), _seeded(0), nullcontext() if is_users(arch) else refusing(takes):
        output = model.eval()(_blank(model, 1, image_shape))
    _check_output(output, 1, num_classes, "evaluation")
    model.train()


def check_fresh_draws(build: Callable[[], nn.Module], image_shape: tuple[int, ...]) -> None:
    """Refuse networks that do not depend on the seed and on nothing else, or that are random in evaluation mode."""
    draws = []
    for seed in (0, 0, 1):
        with _seeded(seed):
            draws.append(build().eval())
    first, again, other = draws
    if {id(part) for part in [first, *first.parameters()]} & {id(part) for part in [again, *again.parameters()]}:
        raise Refusal("two calls of the factory return the same network or share weights: it must build a new one")
    with torch.no_grad(), _seeded(2):
        image = torch.randn_like(_blank(first, 1, image_shape))
        outputs = [network(image.clone()) for network in (first, first, again, other)]
    if not _equal(outputs[:1], outputs[1:2]):
        raise Refusal("the network is random in evaluation mode: it gives two outputs for one image")
    if not _equal([*first.parameters(), outputs[0]], [*again.parameters(), outputs[2]]):
        raise Refusal("two networks of one seed differ: draw from the global generators of torch, NumPy or Python")
    if _equal([*first.parameters(), outputs[0]], [*other.parameters(), outputs[3]]):
        raise Refusal("networks of two seeds are equal: draw the weights anew, not pretrained or from a fixed seed")


def check_training_step(
    build: Callable[[], nn.Module], image_shape: tuple[int, ...], num_classes: int, *, last_batch: int = 2
) -> None:
    """Refuse a network that cannot take a training step on two images, or on one if an epoch's last batch has one."""
    with _seeded(0), torch.enable_grad():
        model = build().train()
        for num_images in [2] + [1] * (last_batch == 1):
            images = _blank(model, num_images, image_shape)
            try:
                output = model(images)
            except ValueError as error:
                if num_images > 1 or "more than 1 value per channel" not in str(error):
                    raise
                problem = "batch norm cannot train on the last batch, which has one image"
                raise Refusal(f"{problem}: choose another --batch-size or --num-train") from None
            _check_output(output, num_images, num_classes, "training")
            if not output.requires_grad:
                raise Refusal("the network cannot be trained: its output in training mode has no gradient")
            F.cross_entropy(output, torch.zeros(num_images, dtype=torch.int64, device=output.device)).backward()


def _check_output(output: object, num_images: int, num_classes: int, mode: str) -> None:
    fits = isinstance(output, Tensor) and output.ndim == 2 and len(output) == num_images
    if not fits or output.shape[1] < num_classes:
        returned = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        expected = f"expected one tensor ({num_images}, {num_classes}), a value for each class"
        raise Refusal(f"for {num_images} images in {mode} mode the network returns {returned}: {expected}")


def _blank(model: nn.Module, num_images: int, image_shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(num_images, *image_shape, device=next(model.parameters()).device)


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all tensors are equal; nan equals nan."""
    same = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=False)]
    return len(first) == len(second) and all(same)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and Python; restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            for seed_one in (random.seed, np.random.seed, torch.manual_seed):
                seed_one(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
