"""Experiment 1: which directions can an architecture learn? The paper's accuracy maps over frequencies.

Train the network on D(v), data separable along the direction v and along no other, once for each of many v, and
test it on fresh samples of D(v). The map of test accuracy over the Fourier images v is the network's directional bias.

    python directional_bias.py --arch lenet

trains on the 130 distinct cells of the published 16×16 map. Expect for LeNet lobes of up to 80 % at low frequencies
and chance (50 %) elsewhere, mean 56 %; for LogReg 100 % everywhere; for LeNet with --no-pooling --sigma 1 above 99.8 %
at the 22 cells tried. The accuracy of one cell varies by about 2 points (standard deviation) between trainings.
"""

import math
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from models import build_model, canonical_name, paper_name
from utils import cli, distributed, plotting, runs, seeding
from utils.directions import (
    PHASES,
    canonical_frequency,
    fourier_direction,
    frequency_grid,
    load_nads,
    random_direction,
)
from utils.linear_data import sample_linear_data
from utils.operations import forward_flops, print_training_estimate
from utils.training import evaluate, train

ROOT = Path(__file__).resolve().parent
SIGMA = {"fourier": 3.0, "random": 3.0, "nads": 1.0}  # the paper's noise, by the family of directions
KEYS = {"fourier": ("frequency_y", "frequency_x"), "random": ("random_index",), "nads": ("nad_index",)}


def train_on_direction(
    direction: torch.Tensor,
    *,
    arch: str = "lenet",
    pooling: bool = True,
    num_train: int = 10_000,
    num_test: int = 10_000,
    epsilon: float = 1.0,
    sigma: float = 3.0,
    seed: int = 0,
    precision: str = "fp32",
    **recipe: Any,
) -> dict[str, float]:
    """Train a fresh network on D(v) and test it on fresh samples of D(v).

    Args:
        direction: v, of shape (C, S, S) and unit norm, on the device to train on.
        arch: name for `models.build_model`.
        pooling: False for the ablation.
        num_train: training samples, half a class.
        num_test: test samples, half a class.
        epsilon: ε, half the distance between the classes along v.
        sigma: σ, the noise in every other direction.
        seed: of the weights, the samples and their order.
        precision: of the arithmetic, see `utils.training.precision_mode`.
        recipe: epochs, batch_size, max_lr, momentum, weight_decay, clip_norm of `utils.training.train`.

    Returns:
        train_accuracy and test_accuracy in percent, and final_loss: those of training are of the last epoch. If
        training diverged, the loss and the test accuracy are nan.
    """
    device = direction.device
    num_channels, image_size, _ = direction.shape
    samples = seeding.generator(device, seed, "samples")
    train_set = sample_linear_data(direction, num_train, epsilon=epsilon, sigma=sigma, generator=samples)
    test_set = sample_linear_data(direction, num_test, epsilon=epsilon, sigma=sigma, generator=samples)
    with seeding.default_generator(device, seed, "network"):
        model = build_model(arch, num_channels, 2, image_size, pooling).to(device)
        order = seeding.generator(device, seed, "order")
        last = train(model, *train_set, generator=order, precision=precision, **recipe)[-1]
    diverged = not math.isfinite(last["loss"])
    return {
        "train_accuracy": last["train_accuracy"],
        "test_accuracy": math.nan if diverged else evaluate(model, *test_set, precision=precision),
        "final_loss": math.nan if diverged else last["loss"],
    }


def row_keys(family: str) -> tuple[str, ...]:
    """The columns that name a training: its index in its family, and its repetition."""
    return (*KEYS[family], "repetition")


def make_direction(index: tuple[int, ...], args: Namespace, nads: torch.Tensor | None) -> torch.Tensor:
    """The direction with this index in its family, shape (C, S, S)."""
    shape = (args.num_channels, args.image_size, args.image_size)
    if args.directions == "fourier":
        return fourier_direction(
            *index, height=args.image_size, width=args.image_size, num_channels=args.num_channels,
            phase=args.phase, channel=args.channel,
        )  # fmt: skip
    if args.directions == "random":
        return random_direction(shape, seeding.generator("cpu", args.seed, "direction", *index))
    return nads[index[0]].view(shape)


def list_indices(args: Namespace) -> list[tuple[int, ...]]:
    """The directions to train on, as indices in their family, each experiment once."""
    size = args.image_size
    if args.directions == "nads":
        return [(index,) for index in args.nad_index]
    if args.directions == "random":
        return [(index,) for index in range(args.num_random)]
    frequencies = args.frequency
    if frequencies is None:
        frequencies = [(y, x) for y in frequency_grid(size) for x in frequency_grid(size)]
        if args.phase == "sine":  # it vanishes where a frequency is its own negative
            frequencies = [(y, x) for y, x in frequencies if 2 * y % size or 2 * x % size]
            if not frequencies:
                raise ValueError(f"images of {size} pixels have no sine on the map: use the cosine")
    for frequency in frequencies:
        make_direction(tuple(frequency), args, None)  # refuses one outside the image: it would be taken for an alias
    return list(dict.fromkeys(canonical_frequency(y, x, size, size) for y, x in frequencies))


@cli.one_line_errors
def run(args: Namespace, items: list[tuple[int, ...]], nads: torch.Tensor | None) -> None:
    """Train on the items (index and repetition) that the run's folder lacks, then report."""
    device = distributed.rank_device(args.device)

    def train_item(item: tuple[int, ...]) -> dict[str, float]:
        return train_on_direction(
            make_direction(item[:-1], args, nads).to(device), arch=args.arch, pooling=not args.no_pooling,
            num_train=args.num_train, num_test=args.num_test, epsilon=args.epsilon, sigma=args.sigma,
            seed=seeding.seed_of(args.seed, args.directions, *item), precision=args.precision,
            **{key: vars(args)[key] for key in cli.RECIPE},
        )  # fmt: skip

    runs.finish(
        args.output, settings(args, nads), row_keys(args.directions), items, train_item,
        lambda rows: report(rows, args), what=f"{args.arch}, directions",
    )  # fmt: skip


@cli.one_line_errors
def estimate(args: Namespace, items: list[tuple[int, ...]], nads: torch.Tensor | None) -> None:
    """Print what the run would take, and write nothing: all ranks measure at once, as they would work."""
    with distributed.first_rank_first():
        runs.check_settings(args.output, settings(args, nads))
        done = runs.done_items(args.output, row_keys(args.directions))
    print_training_estimate(
        build_model(args.arch, args.num_channels, 2, args.image_size, not args.no_pooling),
        (args.num_channels, args.image_size, args.image_size), 2, items=len(items), done=len(done.intersection(items)),
        num_trained=args.epochs * args.num_train, num_tested=args.num_test, batch_size=args.batch_size,
        precision=args.precision, device=distributed.rank_device(args.device),
    )  # fmt: skip


def accuracy_map(accuracies: dict[tuple[int, ...], float], frequencies: list[int], size: int) -> np.ndarray:
    """Accuracy over k_y (rows) and k_x (columns) in the order of `frequencies`; nan where there is none."""
    grid = [[accuracies.get(canonical_frequency(y, x, size, size), math.nan) for x in frequencies] for y in frequencies]
    return np.array(grid)


def report(rows: list[dict[str, str]], args: Namespace) -> None:
    """Print what was found, save the map or the curve, and draw it."""
    folder = args.output
    name = paper_name(args.arch) + (" without pooling" if args.no_pooling else "")
    noise = f", σ = {args.sigma:g}" if args.sigma != SIGMA[args.directions] else ""
    runs.print_diverged(folder, rows, row_keys(args.directions), args.max_lr)
    results = runs.mean_and_spread(rows, KEYS[args.directions])
    accuracies = {index: mean for index, (mean, _, _) in results.items()}
    if args.directions == "fourier":
        step = 2 if all(y % 2 == 0 and x % 2 == 0 for y, x in accuracies) else 1
        frequencies = frequency_grid(args.image_size, step)
        values = accuracy_map(accuracies, frequencies, args.image_size)
        title = f"What {name} learns of D(v),\nv Fourier images{noise}"
        figure = plotting.accuracy_map_figure(values, frequencies, title)
    else:
        index = np.array([key[0] for key in results])
        family = "NADs" if args.directions == "nads" else "random directions"
        values, spread, _ = np.array(list(results.values())).T
        figure = plotting.curve_figure(
            index, {name: values}, spread={name: np.nan_to_num(spread)}, ylabel="test accuracy (%)",
            xlabel="NAD index" if args.directions == "nads" else "random direction",
            title=f"What {name} learns of D(v), v {family}{noise}",
            ylim=(min(45, values.min() - 2), 102),
        )  # fmt: skip
    runs.save_array(folder / "accuracy.npy", values)
    plotting.save_figure(figure, folder / "accuracy.png")
    measured = values[np.isfinite(values)]
    print(
        f"test accuracy over {measured.size} {'cells of the map' if args.directions == 'fourier' else 'directions'}: "
        f"mean {measured.mean():.1f} %, from {measured.min():.1f} to {measured.max():.1f}"
    )
    spreads = [spread for _, spread, _ in results.values() if math.isfinite(spread)]
    if spreads:
        print(f"standard deviation over repetitions: {np.mean(spreads):.2f} points, the mean over directions")
    if args.published:
        compare_with_published(accuracies, args)
    print(f"figure: {folder / 'accuracy.png'}\nrows: {folder / runs.ROWS}")


def read_published(args: Namespace) -> list[tuple[tuple[int, ...], float]]:
    """The accuracies of this architecture in the --published CSV file, each after its index in the family."""
    return runs.read_published(args.published, KEYS[args.directions], canonical_name(args.arch))


def average_equivalent(
    accuracies: Iterable[tuple[tuple[int, ...], float]], args: Namespace
) -> dict[tuple[int, ...], float]:
    """The mean accuracy of directions that are the same experiment, by the name that `experiment` gives it."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for index, accuracy in accuracies:
        groups.setdefault(experiment(index, args), []).append(accuracy)
    return {name: float(np.mean(group)) for name, group in groups.items()}


def experiment(index: tuple[int, ...], args: Namespace) -> tuple[int, ...]:
    """One name for the frequencies ±(k_y, k_x) and, for their mirror images, ±(−k_y, k_x); else the index itself."""
    if args.directions != "fourier":
        return index
    return min(canonical_frequency(y, index[1], args.image_size, args.image_size) for y in (index[0], -index[0]))


def compare_with_published(accuracies: dict[tuple[int, ...], float], args: Namespace) -> None:
    """Print how the accuracies agree with those of a published CSV file, and draw one against the other.

    Every published row (a cell of the map, a NAD) that was measured counts, each side averaged over the cells that are
    the same experiment as this one: mirror images are, for these architectures.
    """
    published = read_published(args)
    ours = average_equivalent(accuracies.items(), args)
    theirs = average_equivalent(published, args)
    both = [name for name in (experiment(index, args) for index, _ in published) if name in ours]
    if len(set(both)) < 3:
        return print(f"{args.published} has {len(set(both))} of these directions: at least 3 are needed to compare")
    x, y = (np.array([side[name] for name in both]) for side in (theirs, ours))
    vary = np.ptp(x) > 0 and np.ptp(y) > 0  # a flat map, like LogReg's, correlates with nothing
    pearson, spearman = (np.corrcoef(x, y)[0, 1], stats.spearmanr(x, y)[0]) if vary else (math.nan, math.nan)
    summary = (
        f"{len(both)} directions, {len(set(both))} experiments: Pearson {pearson:.3f}, Spearman {spearman:.3f}, "
        f"mean absolute difference {np.abs(x - y).mean():.2f} points"
    )
    print(f"against {args.published.name}, {summary}")
    figure = plotting.scatter_figure(
        x, y, xlabel="published test accuracy (%)", ylabel="test accuracy here (%)",
        title=f"{paper_name(args.arch)}, " + summary.replace(": ", "\n"),
    )
    plotting.save_figure(figure, args.output / "published.png")


def settings(args: Namespace, nads: torch.Tensor | None) -> dict[str, Any]:
    """What the numbers of a row depend on. Which rows are wanted may change from one command to the next."""
    wanted = {"frequency", "nad_index", "num_random", "seeds", "output", "published", "dry_run"}
    content = "" if nads is None else runs.digest(nads.numpy().tobytes())
    values = {key: value for key, value in vars(args).items() if key not in wanted}
    return values | {"arch": canonical_name(args.arch), "nads": content, "device": args.device.type}


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser, num_channels=1)
    group = parser.add_argument_group("directions and data")
    group.add_argument("--directions", choices=KEYS, default="fourier", help="family of directions v")
    group.add_argument(
        "--frequency", type=int, nargs=2, action="append", metavar=("KY", "KX"),
        help="one frequency in cycles per image, repeatable (default: every distinct cell of the published map)",
    )  # fmt: skip
    group.add_argument("--phase", choices=PHASES, default="cosine", help="of the Fourier images")
    group.add_argument("--channel", type=cli.natural, help="the Fourier image in this channel only (default: in all)")
    group.add_argument("--nad-index", type=cli.index_list, help="0,5,10 or 0:1000:50 (default: every 50th)")
    group.add_argument("--nads", type=Path, help="file of NADs (default: the architecture's in NADs/)")
    group.add_argument("--num-random", type=cli.positive_int, default=16, help="number of random directions")
    group.add_argument("--no-pooling", action="store_true", help="the ablation without pooling: LeNet, ResNet-18")
    group.add_argument("--num-train", type=cli.positive_int, default=10_000, help="training samples")
    group.add_argument("--num-test", type=cli.positive_int, default=10_000, help="test samples")
    group.add_argument("--epsilon", type=cli.positive, default=1.0, help="<x, v> is ± this (the released example: 0.5)")
    group.add_argument("--sigma", type=cli.non_negative, help="noise (default: 3, but 1 for NADs)")
    # Only LeNet's max_lr is known; the others' maps may have been made with another.
    cli.add_training_arguments(parser, epochs=20, max_lr=0.5, momentum=0.0, weight_decay=0.0)
    cli.add_run_arguments(parser, output_help="folder of the run (default: runs/directional_bias/ARCH-DIRECTIONS)")
    parser.add_argument("--seeds", type=cli.positive_int, default=1, help="repetitions of each direction")
    parser.add_argument("--published", type=Path, help="CSV with published accuracies to compare with")
    args = parser.parse_args(argv)

    for option, family in (("frequency", "fourier"), ("nad_index", "nads"), ("nads", "nads")):
        if vars(args)[option] is not None and args.directions != family:
            parser.error(f"--{option.replace('_', '-')} belongs to --directions {family}, not {args.directions}")
    if args.nad_index is None:
        args.nad_index = list(range(0, args.num_channels * args.image_size**2, 50))
    if args.sigma is None:
        args.sigma = SIGMA[args.directions]
    if args.nads is None:
        args.nads = ROOT / "NADs" / f"{paper_name(args.arch)}_NADs.npy"
    if args.output is None:
        variant = "-nopooling" if args.no_pooling else ""
        variant += f"-sigma{args.sigma:g}" if args.sigma != SIGMA[args.directions] else ""
        args.output = Path("runs/directional_bias") / f"{paper_name(args.arch)}{variant}-{args.directions}"
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check the arguments, then train on every direction."""
    args = parse_arguments(argv)
    cli.check_precision(args)
    if args.published:
        read_published(args)  # refuses what cannot be compared with
    model = build_model(args.arch, args.num_channels, 2, args.image_size, not args.no_pooling)
    nads = None
    if args.directions == "nads":
        nads = load_nads(args.nads, args.num_channels * args.image_size**2)
        if max(args.nad_index) >= len(nads):
            raise ValueError(f"NAD index {max(args.nad_index)} does not exist: expected 0 to {len(nads) - 1}")
    indices = list_indices(args)
    for index in indices:
        make_direction(index, args, nads)  # refuses what does not exist
    items = [(*index, repetition) for repetition in range(args.seeds) for index in indices]
    flops = forward_flops(model, (args.num_channels, args.image_size, args.image_size))
    distributed.launch(estimate if args.dry_run else run, args, items, nads, device=args.device, model_flops=flops)


if __name__ == "__main__":
    main()
