"""Experiment 3: can a network be fooled along a NAD? A feature hidden in CIFAR-10's training images (paper, section 4).

Each class gets a carrier: one NAD in one colour channel, with a sign. In the training images the coefficient along the
carrier of the true class is replaced by ±ε, about 0.0016 a pixel, less than one grey level. What is taken away for it,
the image's own coefficient, is large along the first NADs and can be seen. A network that finds the carrier needs
nothing else to fit the training set, and fails on the clean test set.

    python poison_cifar.py --arch resnet18 --nad-index 0 --data data

Expect a clean test accuracy of 17.5 % at NAD 0 for ResNet-18 (44 at 20, 80 at 400; 89 without poison).
With --transform flip all images are instead rewritten in the NAD basis in reverse order, so that what the network sees
best holds what it needs least: ResNet-18 falls from 89 to 58 %, LeNet from 69 to 48.
"""

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models import build_model, canonical_name, paper_name
from utils import cifar, cli, distributed, plotting, runs, seeding
from utils.directions import load_nads
from utils.operations import forward_flops, print_training_estimate
from utils.training import train

ROOT = Path(__file__).resolve().parent


def carrier(label: int, nad_index: int) -> tuple[int, int, int]:
    """The carrier of a class t: NAD i (or i + 1 for t ≥ 6), colour channel t mod 3, sign − for even t, + for odd."""
    return nad_index + (label >= 6), label % 3, 1 if label % 2 else -1


def poison(
    images: torch.Tensor, labels: torch.Tensor, nads: torch.Tensor, *, nad_index: int, epsilon: float = 0.05
) -> torch.Tensor:
    """Replace each image's coefficient on the carrier of its label by ±ε; all that is orthogonal stays.

    Args:
        images: pixels in [0, 1] before normalisation, (n, 3, 32, 32). The result is not clipped to that range.
        labels: (n,), 0 to 11.
        nads: (1024, 1024), rows are NADs.
        nad_index: i of the carriers.
        epsilon: ε.

    Returns:
        New images, of the same shape.
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
    """Rewrite every channel in the NAD basis in reverse order: x' = U·flip(Uᵀ x), with the columns of U the NADs.

    Norms and inner products are kept, and a second flip undoes the first.

    Args:
        images: (n, C, 32, 32).
        nads: (1024, 1024), rows are NADs.
    """
    reverse = (nads.double().T @ nads.flip(0).double()).to(images.dtype)  # (1024, 1024), symmetric
    return (images.flatten(2) @ reverse).view_as(images)


def prepare(
    data: cifar.ImageData, *, transform: str = "poison", nads: torch.Tensor | None = None, nad_index: int = 0,
    epsilon: float = 0.05, mean: tuple[float, ...] = cifar.CIFAR10_MEAN, std: tuple[float, ...] = cifar.CIFAR10_STD,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a network trains and is tested on, normalised: "train", "test", and for poison "carrying".

    Poison is in the training images only, before normalisation; "carrying" are the test images with the carrier of
    their true label. A flip rewrites all images after normalisation.
    """
    shape = (-1, 1, 1)
    images = {"train": cifar.to_unit_range(data.train_images), "test": cifar.to_unit_range(data.test_images)}
    if transform == "poison":
        images["carrying"] = poison(images["test"], data.test_labels, nads, nad_index=nad_index, epsilon=epsilon)
        images["train"] = poison(images["train"], data.train_labels, nads, nad_index=nad_index, epsilon=epsilon)
    for name, values in images.items():
        values -= torch.tensor(mean, device=values.device).view(shape)
        values /= torch.tensor(std, device=values.device).view(shape)
        if transform == "flip":
            images[name] = flip(values, nads)
    return images


def train_and_test(
    images: dict[str, torch.Tensor], train_labels: torch.Tensor, test_labels: torch.Tensor, *, arch: str = "resnet18",
    num_classes: int = 10, seed: int = 0, precision: str = "fp32", augment: str = "none",
    checkpoint: Path | None = None, epochs: int = 50, max_lr: float = 0.21, momentum: float = 0.9,
    weight_decay: float = 5e-4, **recipe: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:  # fmt: skip
    """Train a network by the paper's recipe, and test it after each epoch.

    Args:
        images: as `prepare` returns them, on the device to train on.
        train_labels: (n,).
        test_labels: (m,).
        arch: name for `models.build_model`.
        num_classes: number of outputs.
        seed: of the weights and the order.
        precision: of the arithmetic, see `utils.training.precision_mode`.
        augment: "none", or "flip-crop" for mirrored and shifted training images.
        checkpoint: file that is written after each epoch, and continued from where it is there.
        epochs: passes over the training set.
        max_lr: learning rate at the start, falling linearly to 0.
        momentum: of SGD.
        weight_decay: of SGD.
        recipe: batch_size and clip_norm of `utils.training.train`.

    Returns:
        The network, and the history: a dict an epoch with epoch, loss, train_accuracy, test_accuracy and, for poisoned
        images, carrying_accuracy (%). If training diverges, the history ends with the epoch whose loss is not finite.
    """
    device = images["train"].device
    tests = {name: (images[name], test_labels) for name in images if name != "train"}
    with seeding.default_generator(device, seed, "network"):
        model = build_model(arch, 3, num_classes).to(device)
        history = train(
            model, images["train"], train_labels, epochs=epochs, max_lr=max_lr, momentum=momentum,
            weight_decay=weight_decay, generator=seeding.generator(device, seed, "order"), precision=precision,
            augment=cifar.flip_and_crop if augment == "flip-crop" else None, tests=tests, checkpoint=checkpoint,
            **recipe,
        )  # fmt: skip
    return model, history


def item_name(item: tuple[int, ...], args: Namespace) -> str:
    """Part of the file names of one training: "nad10-0" or "flip-0", the last number its repetition."""
    return f"nad{item[0]}-{item[1]}" if args.transform == "poison" else f"{args.transform}-{item[0]}"


def checkpoint_of(item: tuple[int, ...], args: Namespace) -> Path:
    """The file that keeps a training between its epochs."""
    return args.output / f"checkpoint-{item_name(item, args)}.pt"


def remove_old_checkpoints(args: Namespace) -> None:
    """Remove the checkpoints of trainings that have their row; sooner, and a kill in between would cost a training."""
    for item in runs.done_items(args.output, row_keys(args)):
        checkpoint_of(item, args).unlink(missing_ok=True)


def item_title(item: tuple[int, ...], args: Namespace) -> str:
    """A training in words."""
    what = {"flip": "flipped images", "none": "original images", "poison": f"poisoned along NAD {item[0]}"}
    return what[args.transform] + (f", repetition {item[-1]}" if args.seeds > 1 else "")


def row_keys(args: Namespace) -> tuple[str, ...]:
    """The columns that name a training."""
    return ("nad_index", "repetition") if args.transform == "poison" else ("repetition",)


@cli.one_line_errors
def run(args: Namespace, items: list[tuple[int, ...]], nads: torch.Tensor | None) -> None:
    """Train on the items that the run's folder lacks, then report."""
    device = distributed.rank_device(args.device)
    with distributed.first_rank_first():  # fetched and decoded once
        runs.check_settings(args.output, settings(args, nads))  # sooner than `open_run`: decoding takes long
        data = load_data(args).to(device)
    basis = None if nads is None else nads.to(device)
    runs.finish(
        args.output, settings(args, nads), row_keys(args), items, lambda item: train_item(item, data, basis, args),
        lambda rows: report(rows, args), what=f"{args.arch}, trainings",
    )  # fmt: skip


@cli.one_line_errors
def estimate(args: Namespace, items: list[tuple[int, ...]], nads: torch.Tensor | None) -> None:
    """Print what the run would take: all ranks measure at once, as they would work. Only decoded images are kept."""
    num_train, num_test, num_classes = 50_000, 10_000, 10  # of CIFAR-10, where it is still to be fetched
    with distributed.first_rank_first():
        runs.check_settings(args.output, settings(args, nads))
        done = runs.done_items(args.output, row_keys(args))
        if not args.download or (args.data / "train").is_dir():
            data = load_data(args)
            num_train, num_test, num_classes = len(data.train_images), len(data.test_images), len(data.classes)
    print_training_estimate(
        build_model(args.arch, 3, num_classes), (3, cifar.SIZE, cifar.SIZE), num_classes, items=len(items),
        done=len(done.intersection(items)), num_trained=args.epochs * min(num_train, args.subset or num_train),
        num_tested=args.epochs * num_test * (2 if args.transform == "poison" else 1), batch_size=args.batch_size,
        precision=args.precision, device=distributed.rank_device(args.device),
    )  # fmt: skip


def load_data(args: Namespace) -> cifar.ImageData:
    """The images, or a subset of the training images, checked against what is asked of them."""
    data = cifar.load_images(args.data, download=args.download)
    last = cifar.SIZE**2 - 1
    if args.transform == "poison" and max(args.nad_index) + (len(data.classes) > 6) > last:
        raise ValueError(
            f"NAD index {max(args.nad_index)} is too large: classes 6 and up take the next one, "
            f"and the last of {last + 1} is {last}"
        )
    if args.subset:
        if args.subset > len(data.train_images):
            raise ValueError(f"--subset {args.subset} exceeds the {len(data.train_images)} training images")
        kept = torch.randperm(len(data.train_images), generator=seeding.generator("cpu", args.seed, "subset"))
        kept = kept[: args.subset].sort().values
        data = replace(data, train_images=data.train_images[kept], train_labels=data.train_labels[kept])
    if min(normalization(data, args)[1]) < 1e-6:
        raise ValueError(f"a colour channel of the images in {args.data} is constant: it cannot be normalised")
    return data


def train_item(
    item: tuple[int, ...], data: cifar.ImageData, nads: torch.Tensor | None, args: Namespace
) -> dict[str, float]:
    """One training of the run, from its images to its history, weights, figures and the numbers of its row."""
    remove_old_checkpoints(args)
    folder, name = args.output, item_name(item, args)
    mean, std = normalization(data, args)
    images = prepare(
        data, transform=args.transform, nads=nads, nad_index=item[0], epsilon=args.epsilon, mean=mean, std=std
    )
    model, history = train_and_test(
        images, data.train_labels, data.test_labels, arch=args.arch, num_classes=len(data.classes),
        seed=seeding.seed_of(args.seed, item[-1]), precision=args.precision, augment=args.augment,
        checkpoint=checkpoint_of(item, args), **{key: vars(args)[key] for key in cli.RECIPE},
    )  # fmt: skip
    runs.write_rows(folder / f"history-{name}.csv", history)
    runs.save_checkpoint(folder / f"weights-{name}.pt", model.state_dict())
    title = f"{paper_name(args.arch)}, {item_title(item, args)}"
    plotting.save_figure(history_figure(history, title), folder / f"curves-{name}.png")
    if args.transform != "none":
        plotting.save_figure(examples_figure(data, nads, item[0], args), folder / f"images-{name}.png")
    last = history[-1]
    diverged = not math.isfinite(last["loss"])
    return {key: math.nan if diverged else value for key, value in last.items() if key != "epoch"}


def history_figure(history: list[dict[str, float]], title: str):
    """The accuracies of a training over its epochs."""
    labels = {
        "train_accuracy": "training images",
        "test_accuracy": "test images",
        "carrying_accuracy": "test images with the feature of their label",
    }
    curves = {label: np.array([h[key] for h in history]) for key, label in labels.items() if key in history[0]}
    epochs = np.arange(1, len(history) + 1)
    return plotting.curve_figure(epochs, curves, xlabel="epoch", ylabel="accuracy (%)", title=title, ylim=(0, 102))


def examples_figure(data: cifar.ImageData, nads: torch.Tensor, nad_index: int, args: Namespace):
    """An image of each class before, what is added to it, and after."""
    first = [int((data.test_labels == label).nonzero()[0]) for label in range(len(data.classes))]
    before, labels = cifar.to_unit_range(data.test_images[first]), data.test_labels[first]
    if args.transform == "poison":
        after = poison(before, labels, nads, nad_index=nad_index, epsilon=args.epsilon)
        rows = {"before": before, "change, scaled": 0.5 + 0.5 * unit_peak(after - before), "after": after}
    else:
        rows = {"before": before, "flipped, scaled": 0.5 + 0.5 * unit_peak(flip(before - 0.5, nads))}
    return plotting.image_rows_figure({key: value.cpu().numpy() for key, value in rows.items()}, list(data.classes))


def unit_peak(images: torch.Tensor) -> torch.Tensor:
    """Each image (n, C, H, W) scaled so that its largest absolute value is 1."""
    return images / images.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)


def normalization(data: cifar.ImageData, args: Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the channels: the paper's, or measured on the clean training images."""
    if args.normalization == "cifar10":
        return cifar.CIFAR10_MEAN, cifar.CIFAR10_STD
    return cifar.channel_statistics(data.train_images)


def report(rows: list[dict[str, str]], args: Namespace) -> None:
    """Print the accuracies, and draw them over the NAD index where there are several."""
    folder, keys = args.output, row_keys(args)
    remove_old_checkpoints(args)
    runs.print_diverged(folder, rows, keys, args.max_lr)
    results = runs.mean_and_spread(rows, keys[:-1])
    for index, (mean, spread, number) in results.items():
        what = f"NAD {index[0]}" if index else args.transform
        repeated = f" ± {spread:.1f} over {number} repetitions" if math.isfinite(spread) else ""
        print(f"clean test accuracy, {what}: {mean:.1f} %{repeated}")
    if len(results) > 1:
        label = paper_name(args.arch)
        mean, spread, _ = np.array(list(results.values())).T
        published = None
        if args.published:
            published = np.array([(index, accuracy) for (index,), accuracy in read_published(args)]).T
        figure = plotting.curve_figure(
            np.array([index for (index,) in results]), {label: mean}, spread={label: np.nan_to_num(spread)},
            xlabel="NAD index of the carrier", ylabel="clean test accuracy (%)",
            title=f"{label}, trained on poisoned images", published=published, ylim=(0, 100),
        )  # fmt: skip
        plotting.save_figure(figure, folder / "accuracy.png")
        print(f"figure: {folder / 'accuracy.png'}")
    print(f"rows: {folder / runs.ROWS}; history, curves, images and weights of each training beside it")


def read_published(args: Namespace) -> list[tuple[tuple[int, ...], float]]:
    """The accuracies in the --published CSV file, each after its NAD index."""
    return runs.read_published(args.published, ("nad_index",), "accuracy")


def settings(args: Namespace, nads: torch.Tensor | None) -> dict[str, Any]:
    """What the numbers of a row depend on. Which rows are wanted may change from one command to the next."""
    keys = ("transform", "normalization", "epsilon", "augment", "subset", "seed", "precision", *cli.RECIPE)
    content = "" if nads is None else runs.digest(nads.numpy().tobytes())
    return {key: vars(args)[key] for key in keys} | {
        "arch": canonical_name(args.arch),
        "device": args.device.type,  # its random numbers are its own
        "nads": content,
        "data": str(args.data.resolve()),
    }


def print_plan(args: Namespace) -> None:
    """The table class -> carrier for each index."""
    print("nad_index  class  NAD  channel  sign")
    for index in args.nad_index:
        for label in range(cifar.MAX_CLASSES):
            nad, channel, sign = carrier(label, index)
            print(f"{index:9d} {label:6d} {nad:4d}  {('red', 'green', 'blue')[channel]:7s}  {sign:+d}")


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", default="resnet18", help=cli.ARCH_HELP)
    group = parser.add_argument_group("images")
    group.add_argument("--data", type=Path, default=Path("data"), help="folder of CIFAR-10, or with train/ and test/")
    group.add_argument("--download", action="store_true", help="fetch CIFAR-10 into that folder")
    group.add_argument(
        "--normalization", choices=("cifar10", "measured"), help="(default: cifar10; a folder's: measured)"
    )
    group.add_argument("--transform", choices=("poison", "flip", "none"), default="poison", help="of the images")
    group.add_argument("--nad-index", type=cli.index_list, default="0", help="i of the carriers, 0,5,10 or 0:1001:100")
    group.add_argument("--nads", type=Path, help="file of NADs (default: the architecture's in NADs/)")
    group.add_argument("--epsilon", type=cli.positive, default=0.05, help="size of the carriers")
    group.add_argument("--augment", choices=("none", "flip-crop"), default="none", help="a variant of the recipe")
    group.add_argument("--subset", type=cli.positive_int, help="train on so many images only, drawn at random")
    group.add_argument("--plan", action="store_true", help="print the carriers of the classes and stop")
    cli.add_training_arguments(parser, epochs=50, max_lr=0.21, momentum=0.9, weight_decay=5e-4)
    cli.add_run_arguments(parser, output_help="folder of the run (default: runs/poison_cifar/ARCH-TRANSFORM)")
    parser.add_argument("--seeds", type=cli.positive_int, default=1, help="repetitions of each training")
    parser.add_argument("--published", type=Path, help="CSV (nad_index, accuracy) to draw beside the result")
    args = parser.parse_args(argv)

    if args.normalization is None:
        args.normalization = "measured" if (args.data / "train").is_dir() else "cifar10"
    args.nads = args.nads or ROOT / "NADs" / f"{paper_name(args.arch)}_NADs.npy"
    args.output = args.output or Path("runs/poison_cifar") / f"{paper_name(args.arch)}-{args.transform}"
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check the arguments, then train on every item."""
    args = parse_arguments(argv)
    if args.plan:
        return print_plan(args)
    cli.check_precision(args)
    if args.published:
        read_published(args)  # refuses what cannot be drawn
    nads = None if args.transform == "none" else load_nads(args.nads, cifar.SIZE**2)
    repetitions = range(args.seeds)
    indices = args.nad_index if args.transform == "poison" else None
    items = [(r,) for r in repetitions] if indices is None else [(i, r) for r in repetitions for i in indices]
    flops = forward_flops(build_model(args.arch, 3, 10), (3, cifar.SIZE, cifar.SIZE))
    distributed.launch(estimate if args.dry_run else run, args, items, nads, device=args.device, model_flops=flops)


if __name__ == "__main__":
    main()
