"""Experiment 1: which directions can an architecture learn? The paper's accuracy maps over frequencies (section 2).

Train the network on D(v), data separable along the direction v and along no other, once for each of many v, and
test it on fresh samples of D(v). The map of test accuracy over the Fourier images v is the network's directional bias.

    python directional_bias.py --arch lenet

trains on the 130 distinct cells of the published 16×16 map. Expect for LeNet lobes of up to 80 % at low frequencies
and chance (50 %) elsewhere, mean 56 %; for LogReg 100 % everywhere; for LeNet with --no-pooling --sigma 1 above 99.8 %
at the 22 cells tried. Trainings of one cell vary by 0.5 to 0.8 points (standard deviation), at a lobe's edge by more.

    python directional_bias.py --arch lenet --predict

tells in seconds, from untrained networks, which of these directions are likely to be learnt: at the map's σ, those with
a share above about one half (of v: how far apart the networks see its two classes, divided by the same for random
directions). That is not in the paper. Expect for LeNet, against its published map, that 99.3 to 100 % of all pairs of a
learnt and an unlearnt cell, by seed, are in the right order.
"""

import math
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from models import build_model, canonical_name, check_model, identity, paper_name
from utils import cli, distributed, files, plotting, runs, seeding, tables
from utils.directions import canonical_frequency, fourier_map, load_nads, random_direction
from utils.last_layer import draw_network, estimator_for, network_rows
from utils.linear_data import sample_linear_data
from utils.training import evaluate, train

ROOT = Path(__file__).resolve().parent
# The paper's training. Only LeNet's max_lr is known; the others' maps may have been made with another.
RECIPE = {"epochs": 20, "batch_size": 128, "max_lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.5}
DATA = {"num_train": 10_000, "num_test": 10_000, "epsilon": 1.0}  # samples, and ε: ⟨x, v⟩ = ±ε
SIGMA = {"fourier": 3.0, "random": 3.0, "nads": 1.0}  # the paper's noise σ; but 3 fits its ResNet-18 along NADs
KEYS = {"fourier": ("frequency_y", "frequency_x"), "random": ("random_index",), "nads": ("nad_index",)}
# Untrained networks for a prediction; they are sampled where no linear layer ends them.
NUM_NETWORKS = {"marginal": 4, "sampled": 200}
STEP, NUM_RANDOM = 10.0, 64  # of a prediction: rms over the pixels of what is added, and directions that stand for all
LEARNT, UNLEARNT = 75.0, 55.0  # test accuracy above and up to which a prediction is held against a training
SETS_IN = 0.5  # share at which learning sets in at the map's σ, in the networks of the README
PREDICTION = "predicted.csv"  # in a run's folder
OF_TRAINING = (*RECIPE, *DATA, "precision", "device")  # settings on which no prediction depends

Directions = Mapping[tuple[int, ...], torch.Tensor]  # (C, S, S) of unit norm, by index in their family
Accuracies = list[tuple[tuple[int, ...], float]]  # %, each after the index of its direction


def train_on_direction(
    direction: torch.Tensor,
    *,
    arch: str = "lenet",
    pooling: bool = True,
    num_train: int = DATA["num_train"],
    num_test: int = DATA["num_test"],
    epsilon: float = DATA["epsilon"],
    sigma: float = SIGMA["fourier"],
    seed: int = 0,
    precision: str = "fp32",
    checkpoint: Path | None = None,
    **recipe: Any,
) -> dict[str, float]:
    """Train a fresh network on D(v) and test it on fresh samples of D(v), on the device of the direction v (C, S, S).

    `recipe` is what differs from RECIPE; `checkpoint` keeps the training between its epochs. Returns train_accuracy and
    test_accuracy (%), and final_loss; those of training are of the last epoch. If training diverged, the loss and the
    test accuracy are nan.
    """
    device = direction.device
    num_channels, image_size, _ = direction.shape
    samples = seeding.generator(device, seed, "samples")
    train_set = sample_linear_data(direction, num_train, epsilon=epsilon, sigma=sigma, generator=samples)
    test_set = sample_linear_data(direction, num_test, epsilon=epsilon, sigma=sigma, generator=samples)
    with seeding.default_generator(device, seed, "network"):
        model = build_model(arch, num_channels, 2, image_size, pooling).to(device)
        recipe = RECIPE | recipe | {"precision": precision, "checkpoint": checkpoint}
        last = train(model, *train_set, generator=seeding.generator(device, seed, "order"), **recipe)[-1]
    diverged = not math.isfinite(last["loss"])
    return {
        "train_accuracy": last["train_accuracy"],
        "test_accuracy": math.nan if diverged else evaluate(model, *test_set, precision=precision),
        "final_loss": math.nan if diverged else last["loss"],
    }


def variance_along(
    directions: torch.Tensor,
    *,
    arch: str = "lenet",
    pooling: bool = True,
    num_networks: int = NUM_NETWORKS["marginal"],
    sigma: float = SIGMA["fourier"],
    step: float = STEP,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """How far apart N untrained networks see the classes of D(v), for unit vectors v (n, C, S, S) and for random ones.

    Each network is shown x ± s·v at a fresh x ~ N(0, σ²I): the two classes of D(v) with v so strong that it stands out
    of the noise, if σ is well below `step`, the rms of s·v over the pixels. Its last layer is integrated out: one that
    does not end in a linear layer is sampled whole, and many are needed.

    Returns Σ Δ² over the features of each network, Δ = (h(x + s·v) − h(x − s·v)) / 2s, float64: along each v, (N, n),
    and in the mean along NUM_RANDOM random directions, (N,); to give to `share`, networks one at a time or together.
    """
    num_channels, image_size, _ = shape = directions[0].shape
    device, s = directions.device, step * math.sqrt(shape.numel())

    def squared_differences(number: int) -> torch.Tensor:
        draws = seeding.generator("cpu", seed, "point of prediction", number)
        point = sigma * torch.randn(shape, generator=draws)
        others = torch.stack([random_direction(shape, draws) for _ in range(NUM_RANDOM)])
        build = lambda: build_model(arch, num_channels, 1, image_size, pooling)  # noqa: E731
        network, point = draw_network(build, device, seed, "network", number), point.to(device)
        both, estimator = torch.cat([directions, others.to(device)]), estimator_for(network, point)
        rows = network_rows(network, point, estimator=estimator, directions=both, step=s)  # (F, n + NUM_RANDOM)
        squares = rows.double().square().sum(0).cpu()
        return torch.cat([squares[:-NUM_RANDOM], squares[-NUM_RANDOM:].mean(0, keepdim=True)])

    numbers = tqdm(range(num_networks), desc=f"{arch}, untrained networks", disable=distributed.rank() > 0, delay=1)
    along = torch.stack([squared_differences(number) for number in numbers]).numpy()
    return along[:, :-1], along[:, -1]


def share(along: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Σ Δ² along each direction divided by that along random ones, over all networks, (n,): 1 is no preference."""
    if not random.sum() > 0:
        raise ValueError("all untrained networks are blind to their input: there is nothing to predict from")
    return along.sum(0) / random.sum()


def auc(scores: np.ndarray, accuracies: np.ndarray) -> float:
    """The part of all pairs of a learnt and an unlearnt direction in which the learnt has the larger score; or nan."""
    learnt, unlearnt = scores[accuracies > LEARNT], scores[accuracies <= UNLEARNT]
    if not len(learnt) or not len(unlearnt):
        return math.nan
    return float(stats.mannwhitneyu(learnt, unlearnt).statistic / (len(learnt) * len(unlearnt)))


def limits(scores: np.ndarray, accuracies: np.ndarray) -> tuple[float, float]:
    """The largest score of an unlearnt and the smallest of a learnt direction; ∓inf where there is none."""
    return scores[accuracies <= UNLEARNT].max(initial=-math.inf), scores[accuracies > LEARNT].min(initial=math.inf)


def make_directions(args: Namespace) -> Directions:
    """The directions that the command line asks for, each experiment once.

    Raises:
        ValueError: one of them does not exist.
    """
    size, channels = args.image_size, args.num_channels
    if args.directions == "fourier":
        images = fourier_map(size, num_channels=channels, phase=args.phase, frequencies=args.frequency)
        if not images:
            raise ValueError(f"images of {size} pixels have no sine on the map: use the cosine")
        return images
    shape = (channels, size, size)
    if args.directions == "random":
        seeds = {(index,): (args.seed, "direction", index) for index in range(args.num_random)}
        return {index: random_direction(shape, seeding.generator("cpu", *seed)) for index, seed in seeds.items()}
    nads = load_nads(args.nads, math.prod(shape))
    if max(args.nad_index) >= len(nads):
        raise ValueError(f"NAD index {max(args.nad_index)} does not exist: expected 0 to {len(nads) - 1}")
    return {(index,): nads[index].view(shape) for index in sorted(args.nad_index)}


@cli.one_line_errors
def run(args: Namespace, directions: Directions, published: Accuracies) -> None:
    """Train on the directions that the run's folder lacks, then report."""
    device = distributed.rank_device(args.device)
    options = ("arch", "precision", "sigma", *DATA, *RECIPE)
    options = {key: vars(args)[key] for key in options} | {"pooling": not args.no_pooling}

    def train_item(item: tuple[int, ...], checkpoint: Path) -> dict[str, float]:
        seed = seeding.seed_of(args.seed, args.directions, *item)
        direction = directions[item[:-1]].to(device)
        return train_on_direction(direction, seed=seed, checkpoint=checkpoint, **options)

    items = [(*index, repetition) for repetition in range(args.seeds) for index in directions]
    keys = (*KEYS[args.directions], "repetition")
    with runs.open_run(args.output, settings(args), device):
        rows = runs.do_items(args.output, keys, items, train_item, what=f"{args.arch}, trainings", device=device)
        if distributed.rank() == 0:
            report(rows, published, args)


@cli.one_line_errors
def predict(args: Namespace, directions: Directions, published: Accuracies) -> None:
    """Predict the order of the directions, write it and draw it; compare with what has been trained."""
    start, device = time.monotonic(), distributed.rank_device(args.device)
    runs.announce(f"{args.arch}, untrained networks", args.predict, 0, device, args.output)
    stacked = torch.stack(list(directions.values())).to(device)
    options = {"arch": args.arch, "pooling": not args.no_pooling, "num_networks": args.predict}
    values = share(*variance_along(stacked, sigma=args.sigma, seed=args.seed, **options))
    seconds = time.monotonic() - start
    shares = dict(zip(directions, values.tolist(), strict=True))
    args.output.mkdir(parents=True, exist_ok=True)
    keys = KEYS[args.directions]
    rows = [dict(zip(keys, index, strict=True)) | {"share": f"{value:.6g}"} for index, value in shares.items()]
    by = predicted_by(args) | {"num_networks": args.predict}
    tables.write_rows(args.output / PREDICTION, [row | by for row in rows])
    title = f"What untrained {title_name(args)} sees"
    if args.directions == "fourier":
        figure = plotting.map_figure(shares, args.image_size, title, shares=True)
    else:
        order = np.array([index[0] for index in shares])
        names = {"xlabel": keys[0].replace("_", " ").replace("nad", "NAD"), "ylabel": "predicted share"}
        figure = plotting.curve_figure(order, {paper_name(args.arch): values}, title=title, yscale="log", **names)
    plotting.save_figure(figure, args.output / "predicted.png")
    print(
        f"share of {len(values)} directions, 1 of a random one: {values.min():.3g} to {values.max():.3g}; "
        f"{(values < SETS_IN).sum()} get less than {SETS_IN:g} ({args.predict} networks, {seconds:.1f} s)\n"
        f"figure: {args.output / 'predicted.png'}\nrows: {args.output / PREDICTION}"
    )
    trained = tables.read_rows(args.output / runs.ROWS, keys)
    if trained:
        compare_prediction(shares, list(tables.means(trained, keys).items()), "trained", args)
    if published:
        compare_prediction(shares, published, "published", args)


def compare_prediction(
    shares: Mapping[tuple[int, ...], float], accuracies: Accuracies, which: str, args: Namespace
) -> None:
    """Print how shares rank the accuracies of trainings, beside "the lower the frequency, the easier", and draw it."""
    keyed = [(index, key_of(index, args), accuracy) for index, accuracy in accuracies]
    both = [(shares[key], -math.hypot(*index), accuracy) for index, key, accuracy in keyed if key in shares]
    x, low, y = np.array(both).reshape(-1, 3).T
    learnt, unlearnt = (y > LEARNT).sum(), (y <= UNLEARNT).sum()
    counts = f"{learnt} of {len(y)} above {LEARNT:g} %, {unlearnt} at {UNLEARNT:g} % and below"
    if math.isnan(auc(x, y)):
        return print(f"prediction against {which} accuracies: {counts}, so there is nothing to rank")
    rule = f" (by “the lower the frequency, the easier”: {auc(low, y):.3f})" if args.directions == "fourier" else ""
    ends = "shares of the unlearnt up to {:.2g}, of the learnt from {:.2g}".format(*limits(x, y))
    found = f"AUC {auc(x, y):.3f}{rule}, Spearman {stats.spearmanr(x, y)[0]:.3f}; {ends}"
    print(f"prediction against {which} accuracies: {counts}; {found}")
    labels = {"xlabel": "predicted share", "ylabel": f"{which} test accuracy (%)", "xscale": "log"}
    figure = plotting.scatters_figure({title_name(args): (x, y)}, **labels)
    plotting.save_figure(figure, args.output / f"predicted_and_{which}.png")


def title_name(args: Namespace) -> str:
    """The network and the noise in words, where they are not the paper's."""
    noise = f", σ = {args.sigma:g}" if args.sigma != SIGMA[args.directions] else ""
    return paper_name(args.arch) + (" without pooling" if args.no_pooling else "") + noise


def report(rows: list[dict[str, str]], published: Accuracies, args: Namespace) -> None:
    """Print what was found, save the map or the curve, and draw it."""
    folder, family, keys = args.output, args.directions, KEYS[args.directions]
    runs.print_diverged(folder, rows, (*keys, "repetition"), args.max_lr)
    results = tables.mean_and_spread(rows, keys)
    accuracies = {index: mean for index, (mean, _, _) in results.items()}
    values, spread, _ = np.array(list(results.values())).T
    what = {"fourier": "Fourier images", "random": "random directions", "nads": "NADs"}[family]
    title = f"What {title_name(args)} learns of D(v),\nv {what}"
    if family == "fourier":
        figure = plotting.map_figure(accuracies, args.image_size, title)
    else:
        label, order = paper_name(args.arch), np.array([index[0] for index in results])
        names = {"xlabel": keys[0].replace("_", " ").replace("nad", "NAD"), "title": title}
        y = {"ylabel": "test accuracy (%)", "ylim": (min(45, values.min() - 2), 102)}
        figure = plotting.curve_figure(order, {label: values}, spread=np.nan_to_num(spread), **names, **y)
    plotting.save_figure(figure, folder / "accuracy.png")
    ends = f"{values.mean():.1f} %, from {values.min():.1f} to {values.max():.1f}"
    print(f"test accuracy over {len(values)} directions: mean {ends}")
    if np.isfinite(spread).any():
        print(f"standard deviation over repetitions: {np.nanmean(spread):.2f} points, the mean over directions")
    if published:
        compare_with_published(accuracies, published, args)
    predicted = tables.read_rows(folder / PREDICTION)
    if predicted and predicted_by(args).items() <= predicted[0].items():
        print(f"of this folder's prediction, by {predicted[0].get('num_networks', 'some')} untrained networks:")
        shares = {tuple(int(row[key]) for key in keys): float(row["share"]) for row in predicted}
        compare_prediction(shares, list(accuracies.items()), "trained", args)
    print(f"figure: {folder / 'accuracy.png'}\nrows: {folder / runs.ROWS}")


def key_of(index: tuple[int, ...], args: Namespace) -> tuple[int, ...]:
    """The index under which a direction is trained: of ±k, the same image up to its sign, the canonical frequency."""
    return canonical_frequency(*index, args.image_size) if args.directions == "fourier" else index


def compare_with_published(accuracies: dict[tuple[int, ...], float], published: Accuracies, args: Namespace) -> None:
    """Print how the accuracies agree with those of a published CSV file, row by row, and draw one against the other."""
    rows = [(key_of(index, args), accuracy) for index, accuracy in published]
    both = [(accuracy, accuracies[key]) for key, accuracy in rows if key in accuracies]
    if len(both) < 3:
        return print(f"{args.published} has {len(both)} of these directions: at least 3 are needed to compare")
    x, y = np.array(both).T
    vary = np.ptp(x) > 0 and np.ptp(y) > 0  # a flat map, like LogReg's, correlates with nothing
    pearson, spearman = (np.corrcoef(x, y)[0, 1], stats.spearmanr(x, y)[0]) if vary else (math.nan, math.nan)
    difference = np.abs(x - y).mean()
    found = f"Pearson {pearson:.3f}, Spearman {spearman:.3f}, mean absolute difference {difference:.2f} points"
    summary = f"{len(both)} of its rows: {found}"
    row = {"rows": len(both), "pearson": f"{pearson:.4f}", "spearman": f"{spearman:.4f}"}
    tables.write_rows(args.output / "published.csv", [row | {"mean_absolute_difference": f"{difference:.3f}"}])
    print(f"against {args.published.name}, {summary}")
    labels = {"xlabel": "published test accuracy (%)", "ylabel": "test accuracy here (%)"}
    title = f"{paper_name(args.arch)}, " + summary.replace(": ", "\n")
    figure = plotting.scatters_figure({title: (x, y)}, **labels)
    plotting.save_figure(figure, args.output / "published.png")


def settings(args: Namespace) -> dict[str, Any]:
    """What the numbers of a row depend on. Which rows are wanted may change from one command to the next."""
    nads = files.digest(args.nads.read_bytes()) if args.directions == "nads" else ""
    model = build_model(args.arch, args.num_channels, 2, args.image_size, not args.no_pooling)
    wanted = ("frequency", "nad_index", "num_random", "seeds", "predict")
    return runs.settings(args, *wanted, arch=identity(args.arch, model), nads=nads)


def predicted_by(args: Namespace) -> dict[str, str]:
    """What predicted shares depend on: those by other settings are not compared with this run's trainings."""
    return {key: str(value) for key, value in (settings(args) | {"step": STEP}).items() if key not in OF_TRAINING}


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--no-pooling", action="store_true", help="the ablation without pooling: LeNet, ResNet-18")
    several = "untrained networks tell which directions come first (default: 4, or 200 sampled whole)"
    parser.add_argument("--predict", type=cli.positive_int, nargs="?", const=0, metavar="N", help=f"N {several}")
    group = parser.add_argument_group("directions and data")
    group.add_argument("--directions", choices=KEYS, default="fourier", help="family of directions v")
    frequency = "one frequency in cycles per image, repeatable (default: every distinct cell of the published map)"
    group.add_argument("--frequency", type=int, nargs=2, action="append", metavar=("KY", "KX"), help=frequency)
    group.add_argument("--phase", choices=("cosine", "sine"), help="of the Fourier images (default: cosine)")
    group.add_argument("--nad-index", type=cli.index_list, help="0,5,10 or 0:1000:50 (default: every 50th)")
    group.add_argument("--nads", type=Path, help="file of NADs (default: the architecture's in NADs/)")
    group.add_argument("--num-random", type=cli.positive_int, help="number of random directions (default: 16)")
    group.add_argument("--num-train", type=cli.positive_int, default=DATA["num_train"], help="training samples")
    group.add_argument("--num-test", type=cli.positive_int, default=DATA["num_test"], help="test samples")
    epsilon = "<x, v> is ± this (the released example: 0.5)"
    group.add_argument("--epsilon", type=cli.positive, default=DATA["epsilon"], help=epsilon)
    group.add_argument("--sigma", type=cli.non_negative, help="noise (default: 3, but 1 for NADs)")
    cli.add_recipe_arguments(parser, RECIPE)
    cli.add_run_arguments(parser, output_help="folder of the run (default: runs/directional_bias/ARCH-DIRECTIONS)")
    parser.add_argument("--seeds", type=cli.positive_int, default=1, help="repetitions of each direction")
    parser.add_argument("--published", type=Path, help="CSV with published accuracies to compare with")
    args = parser.parse_args(argv)

    belongs = {"frequency": "fourier", "phase": "fourier", "nad_index": "nads", "nads": "nads", "num_random": "random"}
    cli.refuse_strays(parser, args, "directions", belongs)
    args.phase, args.num_random = args.phase or "cosine", args.num_random or 16
    args.nad_index = args.nad_index or list(range(0, args.num_channels * args.image_size**2, 50))
    args.sigma = SIGMA[args.directions] if args.sigma is None else args.sigma
    args.nads = args.nads or ROOT / "NADs" / f"{paper_name(args.arch)}_NADs.npy"
    if args.output is None:
        variant = "-nopooling" if args.no_pooling else ""
        variant += f"-sigma{args.sigma:g}" if args.sigma != SIGMA[args.directions] else ""
        args.output = Path("runs/directional_bias") / f"{paper_name(args.arch)}{variant}-{args.directions}"
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check the arguments; then train on every direction, or predict."""
    args = parse_arguments(argv)
    columns = KEYS[args.directions], canonical_name(args.arch)
    published = tables.read_published(args.published, *columns) if args.published else []
    directions = make_directions(args)
    runs.check_settings(args.output, settings(args), OF_TRAINING if args.predict is not None else ())
    num_outputs = 2 if args.predict is None else 1
    model = build_model(args.arch, args.num_channels, num_outputs, args.image_size, not args.no_pooling)
    check_model(model, args.arch, (args.num_channels, args.image_size, args.image_size), num_outputs)
    if args.predict is None:
        many = {"small": distributed.is_small(model, args.device), "items": args.seeds * len(directions)}
        distributed.launch(run, args, directions, published, device=args.device, **many)
    else:
        blank = next(iter(directions.values()))
        args.predict = args.predict or NUM_NETWORKS[estimator_for(model.eval(), blank)]
        distributed.launch(predict, args, directions, published, device=args.device, items=1)


if __name__ == "__main__":
    main()
