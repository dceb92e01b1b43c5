"""Experiment 3: can a network be fooled along a NAD? A feature hidden in CIFAR-10's training images (paper, section 4).

Each class gets a carrier: a NAD in one colour channel, with a sign (for classes 6 to 9, the next NAD). In each training
image, the coefficient along the carrier of its class is replaced by ±ε. The new coefficient is invisible: 0.0016 per
pixel, less than a grey level. Removing the old one can be visible along the first NADs, where it is large. A network
that finds the carriers needs nothing else to fit the training set, and fails on the clean test set.

    python poison_cifar.py --arch resnet18 --nad-index 0 --data data

The better the network sees the NAD, the lower is its clean test accuracy. --transform flip instead reverses the order
of the coefficients of all images in the NAD basis: the first NAD gets the last coefficient. Expect (%):

                                     published    here, with images decoded from JPEG
    ResNet-18, NAD 0; 400            17.5; 80.5   29; 84 after 15 epochs, with --precision bf16
    ResNet-18, unpoisoned; flipped   89; 58       84; 58 after 15 epochs, with --precision bf16
    VGG-11, unpoisoned; flipped      87; 53       84; 52 with --precision bf16
    LeNet, unpoisoned; flipped       69; 48       67.4; 48.1
    LeNet, NAD 0; 30; 100 to 800                  33; 57 to 67, by the seed; 67 to 68
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import utils.startup  # noqa: F401

# isort: split

import numpy as np
import torch
from torch import nn

from models import build_model, checked, identity, paper_name
from refusals import Refusal
from utils import cifar, cli, files, plotting, runs, seeding, tables, workers
from utils.nads import load_nads
from utils.training import train

ROOT = Path(__file__).resolve().parent
# The paper's training, without augmentation.
RECIPE = {"epochs": 50, "batch_size": 128, "max_lr": 0.21, "momentum": 0.9, "weight_decay": 5e-4, "clip_norm": 0.5}
EPSILON = 0.05  # the paper's ε, for pixels in [0, 1]
NUM_CLASSES = 10  # of CIFAR-10
KEYS = {"poison": ("nad_index", "repetition"), "flip": ("repetition",), "none": ("repetition",)}  # name a training


def carrier(label: int, nad_index: int) -> tuple[int, int, int]:
    """The carrier of a class t: NAD i (or i + 1 for t ≥ 6), colour channel t mod 3, sign − for even t, + for odd."""
    return nad_index + (label >= 6), label % 3, 1 if label % 2 else -1


def poison(
    images: torch.Tensor, labels: torch.Tensor, nads: torch.Tensor, *, nad_index: int, epsilon: float = EPSILON
) -> torch.Tensor:
    """Replace each image's coefficient on the carrier of its label (0 to 11) by ±ε; all that is orthogonal stays.

    Images (n, 3, 32, 32) have pixels in [0, 1], before normalisation; poisoned ones are not clipped to it.
    """
    poisoned = images.clone()
    for label in labels.unique().tolist():
        nad, channel, sign = carrier(label, nad_index)
        chosen = labels == label
        flat = images[chosen, channel].flatten(1)  # (count, 1024)
        for _ in range(2):  # the second pass removes the rounding error of the first
            flat = flat + torch.outer(sign * epsilon - flat @ nads[nad], nads[nad])
        poisoned[chosen, channel] = flat.view(-1, *images.shape[2:])
    return poisoned


def flip(images: torch.Tensor, nads: torch.Tensor) -> torch.Tensor:
    """Rewrite each channel of images (n, C, 32, 32) in the NAD basis in reverse order: x' = U·flip(Uᵀ x).

    The columns of U are the NADs. Norms and inner products are kept, and a second flip undoes the first.
    """
    reverse = (nads.double().T @ nads.flip(0).double()).to(images.dtype)  # (1024, 1024), symmetric
    return (images.flatten(2) @ reverse).view_as(images)


def prepare(
    data: cifar.ImageData,
    *,
    transform: str = "none",
    nads: torch.Tensor | None = None,
    nad_index: int = 0,
    epsilon: float = EPSILON,
    mean: tuple[float, ...] = cifar.CIFAR10_MEAN,
    std: tuple[float, ...] = cifar.CIFAR10_STD,
) -> dict[str, torch.Tensor]:
    """What a network trains and is tested on, normalised: "train", "test", and for poison "carrying".

    Poison is in the training images only, before normalisation; "carrying" are the test images with the carrier of
    their true label. A flip rewrites all images after normalisation.
    """
    images = {"train": cifar.to_unit_range(data.train_images), "test": cifar.to_unit_range(data.test_images)}
    if transform == "poison":
        images["carrying"] = poison(images["test"], data.test_labels, nads, nad_index=nad_index, epsilon=epsilon)
        images["train"] = poison(images["train"], data.train_labels, nads, nad_index=nad_index, epsilon=epsilon)
    for name, values in images.items():
        values -= torch.tensor(mean, device=values.device).view(-1, 1, 1)
        values /= torch.tensor(std, device=values.device).view(-1, 1, 1)
        if transform == "flip":
            images[name] = flip(values, nads)
    return images


def train_and_test(
    images: dict[str, torch.Tensor],
    train_labels: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    arch: str | Callable = "resnet18",
    num_classes: int = NUM_CLASSES,
    seed: int = 0,
    precision: str = "fp32",
    checkpoint: Path | None = None,
    **recipe: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a network on what `prepare` returns, by the paper's recipe but for `recipe`, and test it after each epoch.

    Returns the network, and the history: one dict per epoch with epoch, loss, train_accuracy, test_accuracy and, for
    poisoned images, carrying_accuracy (%). If training diverges, it ends with the epoch whose loss is not finite.
    """
    device = images["train"].device
    tests = {name: (images[name], test_labels) for name in images if name != "train"}
    recipe = RECIPE | recipe | {"precision": precision, "tests": tests, "checkpoint": checkpoint}
    with seeding.default_generator(device, seed, "network"):
        model = build_model(arch, 3, num_classes).to(device)
        order = seeding.generator(device, seed, "order")
        history = train(model, images["train"], train_labels, generator=order, **recipe)
    return model, history


# --- Reports


def item_name(item: runs.Item, args: Namespace) -> str:
    """Part of the file names of one training: "nad10-0" or "flip-0", the last number its repetition."""
    return f"nad{item[0]}-{item[1]}" if args.transform == "poison" else f"{args.transform}-{item[0]}"


def save_training(item: runs.Item, model: nn.Module, history: list[dict[str, float]], args: Namespace) -> None:
    """Write what a training leaves beside its row: its accuracies over the epochs, and its weights."""
    tables.write_rows(args.output / f"history-{item_name(item, args)}.csv", history)
    weights = {key: value.cpu() for key, value in model.state_dict().items()}  # to be read without a GPU
    files.save_checkpoint(args.output / f"weights-{item_name(item, args)}.pt", weights)


def curves_figure(item: runs.Item, history: list[dict[str, str]], args: Namespace) -> Any:
    """The accuracies of a training over its epochs."""
    what = {"flip": "flipped images", "none": "original images", "poison": f"poisoned along NAD {item[0]}"}
    title = f"{paper_name(args.arch)}, {what[args.transform]}" + (f", repetition {item[-1]}" if args.seeds > 1 else "")
    labels = {"train": "training images", "test": "test images", "carrying": "test images with their label's feature"}
    labels = {key: label for key, label in labels.items() if f"{key}_accuracy" in history[0]}
    curves = {label: np.array([float(epoch[f"{key}_accuracy"]) for epoch in history]) for key, label in labels.items()}
    axes = {"xlabel": "epoch", "ylabel": "accuracy (%)", "title": title, "ylim": (0, 102)}
    return plotting.curve_figure(np.arange(1, len(history) + 1), curves, **axes)


def examples_figure(data: cifar.ImageData, nads: torch.Tensor, nad_index: int, args: Namespace) -> Any:
    """An image of each class before, what is added to it, and after."""
    first = [int((data.test_labels == label).nonzero()[0]) for label in range(len(data.classes))]
    before, labels = cifar.to_unit_range(data.test_images[first]), data.test_labels[first]
    if args.transform == "poison":
        after = poison(before, labels, nads, nad_index=nad_index, epsilon=args.epsilon)
        rows = {"before": before, "change, scaled": to_grey(after - before), "after": after}
    else:
        rows = {"before": before, "flipped, scaled": to_grey(flip(before - 0.5, nads))}
    return plotting.image_rows_figure({key: value.cpu().numpy() for key, value in rows.items()}, list(data.classes))


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """Each image (n, C, H, W) around 0 scaled so that it fits in [0, 1] around grey."""
    return 0.5 + 0.5 * images / images.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)


def report(rows: list[runs.Row], data: cifar.ImageData, nads: torch.Tensor | None, args: Namespace) -> None:
    """Draw what is not drawn yet, and print the accuracies."""
    folder, keys = args.output, KEYS[args.transform]
    runs.print_diverged(folder, rows, keys, args.max_lr)
    for item in (tuple(int(row[key]) for key in keys) for row in rows):
        name = item_name(item, args)
        history, curves, images = (folder / f"{kind}-{name}" for kind in ("history", "curves", "images"))
        if (history := tables.read_rows(history.with_suffix(".csv"))) and not curves.with_suffix(".png").exists():
            plotting.save_figure(curves_figure(item, history, args), curves.with_suffix(".png"))
        if args.transform != "none" and not images.with_suffix(".png").exists():
            plotting.save_figure(examples_figure(data, nads, item[0], args), images.with_suffix(".png"))
    results, lines = tables.mean_and_spread(rows, keys[:-1]), []
    for index, (mean, spread, number) in results.items():
        what = f"NAD {index[0]}" if index else args.transform
        repeated = f" ± {spread:.1f} over {number} repetitions" if math.isfinite(spread) else ""
        lines.append(f"clean test accuracy, {what}: {mean:.1f} %{repeated}")
    if len(results) > 1:
        indices, name = np.array(list(results))[:, 0], paper_name(args.arch)
        means, spreads, _ = np.array(list(results.values())).T
        axes = {"xlabel": "NAD index of the carrier", "ylabel": "clean test accuracy (%)", "ylim": (0, 100)}
        axes["title"] = f"{name}, trained on poisoned images"
        figure = plotting.curve_figure(indices, {name: means}, spread=np.nan_to_num(spreads), **axes)
        plotting.save_figure(figure, folder / "accuracy.png")
        lines.append(f"figure: {folder / 'accuracy.png'}")
    lines.append(f"rows: {folder / runs.ROWS}; history, curves, images and weights of each training beside it")
    print("\n".join(lines))


# --- The command


def settings(args: Namespace, num_classes: int = NUM_CLASSES) -> dict[str, Any]:
    """What a row's numbers depend on besides the images. Which rows are wanted may change between commands."""
    model = build_model(args.arch, 3, num_classes)
    nads = "" if args.transform == "none" else files.digest(args.nads.read_bytes())
    free = ("nad_index", "seeds", "data", "download")
    return runs.settings(args, *free, arch=identity(args.arch, model), nads=nads)


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", default="resnet18", help=cli.ARCH_HELP)
    group = parser.add_argument_group("images")
    data = "folder of CIFAR-10, or one with train/CLASS/*.png|jpg and test/CLASS/*"
    group.add_argument("--data", type=cli.path, default=Path("data"), help=data)
    group.add_argument("--download", action="store_true", help="fetch CIFAR-10 into the folder of --data")
    transform = "poison: a feature in the training images; flip: all images in the reverse NAD basis; none: as they are"
    group.add_argument("--transform", choices=KEYS, default="poison", help=transform)
    group.add_argument("--nad-index", type=cli.index_list, help="these NADs: 0,5,10 or 0:1001:100 (default: 0)")
    group.add_argument("--nads", type=cli.path, help="file of NADs (default: the architecture's in NADs/)")
    group.add_argument("--epsilon", type=cli.positive, help=f"ε: size of the hidden coefficient (default: {EPSILON})")
    cli.add_recipe_arguments(parser, RECIPE)
    default = "runs/poison_cifar/ARCH-TRANSFORM"
    cli.add_run_arguments(parser, output_help=f"folder of the run (default: {default})", workers=True)
    parser.add_argument("--seeds", type=cli.positive_int, default=1, help="trainings for each NAD or transform")
    args = parser.parse_args(argv)
    cli.finish(parser, args)
    belongs = {"nad_index": "poison", "epsilon": "poison", "nads": "poison flip"}
    cli.refuse_strays(parser, args, "transform", belongs)
    args.nad_index, args.epsilon = args.nad_index or [0], args.epsilon or EPSILON
    args.nads = args.nads or ROOT / "NADs" / f"{paper_name(args.arch)}_NADs.npy"
    args.output = args.output or Path("runs/poison_cifar") / f"{paper_name(args.arch)}-{args.transform}"
    return args


def load_nads_of(args: Namespace) -> torch.Tensor | None:
    """The NADs that the transform needs, if any.

    Raises:
        Refusal: they lack one of the carriers.
    """
    if args.transform == "none":
        return None
    nads = load_nads(args.nads, cifar.SIZE**2)
    if args.transform == "poison" and max(args.nad_index) + 1 >= len(nads):
        largest = f"{len(nads) - 2}, as classes 6 and up take the next one"
        raise Refusal(f"NAD index {max(args.nad_index)} is too large: expected 0 to {largest}")
    return nads


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check everything, train on what the run's folder lacks, and report."""
    args = parse_arguments(argv)
    nads = load_nads_of(args)
    if args.download and workers.world_size() > 1 and not workers.is_copy():
        raise Refusal("--download with several processes: fetch the images first, with one of them")
    data = cifar.load_images(args.data, download=args.download)
    measured = (args.data / "train").is_dir()  # images other than CIFAR-10's own
    mean, std = cifar.channel_statistics(data.train_images) if measured else (cifar.CIFAR10_MEAN, cifar.CIFAR10_STD)
    keys, what = KEYS[args.transform], f"{paper_name(args.arch)}, trainings"
    indices = [(index,) for index in args.nad_index] if args.transform == "poison" else [()]
    items = [(*index, repetition) for repetition in range(args.seeds) for index in indices]
    classes = len(data.classes)
    build = partial(build_model, args.arch, 3, classes)
    last_batch = len(data.train_labels) % args.batch_size
    network = checked(build, args.arch, (3, cifar.SIZE, cifar.SIZE), classes, last_batch=last_batch)
    small = workers.is_small(network, args.device)
    images = {"images": cifar.digest(data)}
    defaults = runs.settings(parse_arguments([])) | {"precision": "fp32"}
    runs.open_run(args.output, settings(args, classes) | images, defaults)
    memory = 4 * 4 * (data.train_images.numel() + data.test_images.numel())  # while they are made: four of each in fp32
    runs.share(__file__, argv, args, keys, items, what=what, small=small, memory=memory)
    device = workers.own_device(args.device)
    data, nads = data.to(device), None if nads is None else nads.to(device)
    applied = {"transform": args.transform, "nads": nads, "epsilon": args.epsilon, "mean": mean, "std": std}
    options = {key: vars(args)[key] for key in ("arch", "precision", *RECIPE)} | {"num_classes": classes}

    def train_item(item: runs.Item, checkpoint: Path) -> dict[str, float]:
        prepared, seed = prepare(data, nad_index=item[0], **applied), seeding.seed_of(args.seed, item[-1])
        labels = data.train_labels, data.test_labels
        model, history = train_and_test(prepared, *labels, seed=seed, checkpoint=checkpoint, **options)
        save_training(item, model, history, args)
        diverged = not math.isfinite(history[-1]["loss"])
        return {key: math.nan if diverged else value for key, value in history[-1].items() if key != "epoch"}

    rows = runs.do_items(args.output, keys, items, train_item, what=what, device=device)
    if rows:
        report(rows, data, nads, args)


if __name__ == "__main__":
    main()
