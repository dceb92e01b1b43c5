"""Experiment 1: which directions can an architecture learn, and how fast? The paper's maps (section 2).

For each of many directions v, train a network on D(v), data whose classes differ only along v, and test it on fresh
samples of D(v). The map of test accuracy over the Fourier images v is the network's directional bias.

    python directional_bias.py --arch lenet

trains once for each of the 130 distinct cells of the published 16×16 map. Expect for LeNet up to 80 % at low
frequencies, chance (50 %) at most others, mean 56 %; for LogReg 100 % everywhere; for LeNet with --no-pooling --sigma 1
at least 99.8 % (22 cells). Repetitions vary by 0.5 to 0.8 points (standard deviation), by more where the map is steep.

    python directional_bias.py --arch lenet --measure steps

counts the steps until the training loss is below 0.1, with little noise (σ = 0.5) and a constant learning rate. Expect
for LeNet about 50 steps at the lowest frequencies and 600 at high ones. Where one frequency is 8, the loss does not get
there within 8 epochs (632 steps). The paper discusses this speed but publishes no numbers.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import utils.startup  # noqa: F401

# isort: split

import numpy as np
import torch
from scipy import stats

from models import build_model, canonical_name, checked, identity, paper_name
from refusals import Refusal
from utils import cli, files, plotting, runs, seeding, tables, workers
from utils.directions import canonical_frequency, fourier_map, random_direction
from utils.linear_data import sample_linear_data
from utils.nads import load_nads
from utils.training import evaluate, train

ROOT = Path(__file__).resolve().parent
# The paper's training. Only LeNet's max_lr is known; the others' maps may have been made with another.
RECIPE = {"epochs": 20, "batch_size": 128, "max_lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.5}
DATA = {"num_train": 10_000, "num_test": 10_000, "epsilon": 1.0}  # samples, and ε: ⟨x, v⟩ = ±ε
SIGMA = 3.0  # the paper's noise σ, for every family of directions; but 1 fits its LeNet along NADs
UNTIL_LOSS = 0.1  # for --measure steps: a training loss that counts as small
STEPS_DEFAULTS = {"epochs": 8, "sigma": 0.5}  # for --measure steps: what else differs from the paper's training
COLUMNS = {"accuracy": "test_accuracy", "steps": "steps"}  # of a row, by --measure
KEYS = {"fourier": ("frequency_y", "frequency_x"), "random": ("random_index",), "nads": ("nad_index",)}
FAMILIES = {"fourier": "Fourier images", "random": "random directions", "nads": "NADs"}

Directions = Mapping[tuple[int, ...], torch.Tensor]  # (C, S, S) of unit norm, by index in their family
Accuracies = list[tuple[tuple[int, ...], float]]  # %, each after the index of its direction


def train_on_direction(
    direction: torch.Tensor,
    *,
    arch: str | Callable = "lenet",
    pooling: bool = True,
    num_train: int = DATA["num_train"],
    num_test: int = DATA["num_test"],
    epsilon: float = DATA["epsilon"],
    sigma: float = SIGMA,
    seed: int = 0,
    precision: str = "fp32",
    checkpoint: Path | None = None,
    **recipe: Any,
) -> dict[str, float]:
    """Train a fresh network on D(v) and test it on fresh samples of D(v), on the device of the direction v (C, S, S).

    `recipe` is what differs from RECIPE; `checkpoint` keeps the training between its epochs. Returns train_accuracy and
    test_accuracy (%), and final_loss; those of training are of the last epoch. With `until_loss` also the steps until
    the training loss was below it (see `utils.training.train`), nan if it never was. If training diverged, the loss and
    the test accuracy are nan.
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
    results = {
        "train_accuracy": last["train_accuracy"],
        "test_accuracy": math.nan if diverged else evaluate(model, *test_set, precision=precision),
        "final_loss": math.nan if diverged else last["loss"],
    }
    return results | ({"steps": last["steps"]} if "steps" in last else {})


def make_directions(args: Namespace) -> Directions:
    """The directions that the command line asks for, each experiment once.

    Raises:
        Refusal: one of them does not exist.
    """
    size, channels = args.image_size, args.num_channels
    if args.directions == "fourier":
        images = fourier_map(size, num_channels=channels, phase=args.phase, frequencies=args.frequency)
        if not images:
            raise Refusal(f"images of {size} pixels have no sine on the map: use the cosine")
        return images
    shape = (channels, size, size)
    if args.directions == "random":
        seeds = {(index,): (args.seed, "direction", index) for index in range(args.num_random)}
        return {index: random_direction(shape, seeding.generator("cpu", *seed)) for index, seed in seeds.items()}
    nads = load_nads(args.nads, math.prod(shape))
    if max(args.nad_index) >= len(nads):
        raise Refusal(f"NAD index {max(args.nad_index)} does not exist: expected 0 to {len(nads) - 1}")
    return {(index,): nads[index].view(shape) for index in sorted(args.nad_index)}


# --- Reports


def mean_steps(rows: list[runs.Row], keys: tuple[str, ...]) -> dict[tuple[int, ...], float]:
    """The mean number of steps by direction; infinity where a repetition did not get to a small loss."""
    steps: dict[tuple[int, ...], list[float]] = {}
    for row in rows:
        steps.setdefault(tuple(int(row[key]) for key in keys), []).append(float(row["steps"].replace("nan", "inf")))
    return {index: sum(group) / len(group) for index, group in steps.items()}


def title_name(args: Namespace) -> str:
    """The network and the noise in words, where they are not the paper's."""
    noise = f", σ = {args.sigma:g}" if args.sigma != SIGMA else ""
    return paper_name(args.arch) + (" without pooling" if args.no_pooling else "") + noise


def report(rows: list[runs.Row], published: Accuracies, args: Namespace) -> None:
    """Draw the map or the curve, compare with published accuracies, and print a summary."""
    runs.print_diverged(args.output, rows, (*KEYS[args.directions], "repetition"), args.max_lr)
    results = tables.mean_and_spread(rows, KEYS[args.directions], COLUMNS[args.measure])
    figure, lines = args.output / f"{args.measure}.png", []
    if args.measure == "steps":
        steps = mean_steps(rows, KEYS[args.directions])
        results = {index: result for index, result in results.items() if math.isfinite(steps[index])}
    plotting.save_figure(draw(results, args), figure)
    if args.measure == "steps":
        lines.append(f"the training loss falls below {UNTIL_LOSS:g} for {len(results)} of {len(steps)} directions")
    if results:
        values, spreads, _ = np.array(list(results.values())).T
        ends = f"{values.mean():.1f}, from {values.min():.1f} to {values.max():.1f}"
        lines.append(f"{plotting.LABELS[args.measure]} over {len(values)} directions: mean {ends}")
        if np.isfinite(spreads).any():
            lines.append(f"standard deviation over repetitions: {np.nanmean(spreads):.2f}, the mean over directions")
    if published:
        lines.append(compare_with_published({index: mean for index, (mean, _, _) in results.items()}, published, args))
    print("\n".join([*lines, f"figure: {figure}", f"rows: {args.output / runs.ROWS}"]))


def draw(results: Mapping[tuple[int, ...], tables.Spread], args: Namespace) -> Any:
    """The figure of a run: a map over frequencies, or a curve over the index of the direction."""
    title = f"{title_name(args)}: D(v), v {FAMILIES[args.directions]}"
    means = {index: result.mean for index, result in results.items()}
    if args.directions == "fourier":
        return plotting.map_figure(means, args.image_size, title, scale=args.measure)
    values, spreads, _ = np.array(list(results.values())).reshape(-1, 3).T
    order = np.array([index[0] for index in results])
    labels = {"xlabel": KEYS[args.directions][0].replace("_", " ").replace("nad", "NAD"), "title": title}
    labels |= {"ylabel": plotting.LABELS[args.measure]}
    labels |= {"yscale": "log"} if args.measure == "steps" else {"ylim": (min(45, values.min() - 2), 102)}
    return plotting.curve_figure(order, {paper_name(args.arch): values}, spread=np.nan_to_num(spreads), **labels)


def key_of(index: tuple[int, ...], args: Namespace) -> tuple[int, ...]:
    """The index under which a direction is trained: of ±k, the same image up to its sign, the canonical frequency."""
    return canonical_frequency(*index, args.image_size) if args.directions == "fourier" else index


def compare_with_published(accuracies: dict[tuple[int, ...], float], published: Accuracies, args: Namespace) -> str:
    """Draw the accuracies against those of a published CSV file, row by row; say how they agree."""
    rows = [(key_of(index, args), accuracy) for index, accuracy in published]
    both = [(accuracy, accuracies[key]) for key, accuracy in rows if key in accuracies]
    if len(both) < 3:
        return f"{args.published} has {len(both)} of these directions: at least 3 are needed to compare"
    x, y = np.array(both).T
    vary = np.ptp(x) > 0 and np.ptp(y) > 0  # a flat map, like LogReg's, correlates with nothing
    pearson, spearman = (np.corrcoef(x, y)[0, 1], stats.spearmanr(x, y)[0]) if vary else (math.nan, math.nan)
    difference = np.abs(x - y).mean()
    agreement = f"Pearson {pearson:.3f}, Spearman {spearman:.3f}, mean absolute difference {difference:.2f} points"
    row = {"rows": len(both), "pearson": f"{pearson:.4f}", "spearman": f"{spearman:.4f}"}
    tables.write_rows(args.output / "published.csv", [row | {"mean_absolute_difference": f"{difference:.3f}"}])
    labels = {"xlabel": "published test accuracy (%)", "ylabel": "test accuracy here (%)"}
    title = f"{paper_name(args.arch)}, {len(both)} rows of the published\n{agreement}"
    plotting.save_figure(plotting.scatters_figure({title: (x, y)}, **labels), args.output / "published.png")
    return f"against {args.published.name}, {len(both)} of its rows: {agreement}"


# --- The command


def memory_of_samples(args: Namespace) -> int:
    """Bytes of all samples of one training."""
    return 4 * (args.num_train + args.num_test) * args.num_channels * args.image_size**2


def check(args: Namespace) -> torch.nn.Module:
    """Refuse samples that do not fit into memory, and a network that cannot be trained. Returns one of its kind."""
    shape = (args.num_channels, args.image_size, args.image_size)
    needed, free = memory_of_samples(args), workers.free_memory()
    if needed > free and not workers.is_copy():
        samples = f"--num-train {args.num_train} and --num-test {args.num_test}"
        raise Refusal(f"{samples} need {needed / 1e9:,.0f} GB of memory: {free / 1e9:,.0f} GB are free")
    build = partial(build_model, args.arch, args.num_channels, 2, args.image_size, not args.no_pooling)
    return checked(build, args.arch, shape, 2, last_batch=args.num_train % args.batch_size)


def settings(args: Namespace) -> dict[str, Any]:
    """What the numbers of a row depend on. Which rows are wanted may change from one command to the next."""
    model = build_model(args.arch, args.num_channels, 2, args.image_size, not args.no_pooling)
    nads = files.digest(args.nads.read_bytes()) if args.directions == "nads" else ""
    wanted = ("frequency", "nad_index", "num_random", "seeds")
    return runs.settings(args, *wanted, arch=identity(args.arch, model), nads=nads)


def add_direction_arguments(parser: cli.ArgumentParser) -> None:
    """--directions, the options of each family, and --sigma."""
    group = parser.add_argument_group("directions")
    group.add_argument("--directions", choices=KEYS, default="fourier", help="family of directions v")
    frequency = "one frequency of the Fourier image, vertical and horizontal; repeatable (default: the published map)"
    group.add_argument("--frequency", type=int, nargs=2, action="append", metavar=("KY", "KX"), help=frequency)
    group.add_argument("--phase", choices=("cosine", "sine"), help="phase of the Fourier images (default: cosine)")
    group.add_argument("--nad-index", type=cli.index_list, help="these NADs: 0,5,10 or 0:1000:50 (default: every 50th)")
    group.add_argument("--nads", type=cli.path, help="file of NADs (default: the architecture's in NADs/)")
    group.add_argument("--num-random", type=cli.positive_int, help="number of random directions (default: 16)")
    noise = "standard deviation of the noise; 1 reproduces the published curve along LeNet's NADs"
    group.add_argument("--sigma", type=cli.non_negative, default=SIGMA, help=noise)


def finish_direction_arguments(args: Namespace, parser: cli.ArgumentParser) -> None:
    """Refuse the options of another family of directions, and fill in the defaults of this one."""
    belongs = {"frequency": "fourier", "phase": "fourier", "nad_index": "nads", "nads": "nads", "num_random": "random"}
    cli.refuse_strays(parser, args, "directions", belongs)
    args.phase, args.num_random = args.phase or "cosine", args.num_random or 16
    args.nad_index = args.nad_index or list(range(0, args.num_channels * args.image_size**2, 50))
    args.nads = args.nads or ROOT / "NADs" / f"{paper_name(args.arch)}_NADs.npy"


def folder_name(args: Namespace, usual_sigma: float = SIGMA) -> str:
    """ARCH-DIRECTIONS, between them what is not usual: LeNet-nopooling-sigma1-fourier."""
    variant = "-nopooling" if args.no_pooling else ""
    variant += f"-sigma{args.sigma:g}" if args.sigma != usual_sigma else ""
    return f"{paper_name(args.arch)}{variant}-{args.directions}"


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--no-pooling", action="store_true", help="remove all pooling: LeNet and ResNet-18 only")
    measure = "test accuracy, or steps until the training loss is below 0.1 (by default with --epochs 8 --sigma 0.5)"
    parser.add_argument("--measure", choices=("accuracy", "steps"), default="accuracy", help=measure)
    add_direction_arguments(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--num-train", type=cli.positive_int, default=DATA["num_train"], help="training samples")
    group.add_argument("--num-test", type=cli.positive_int, default=DATA["num_test"], help="test samples")
    group.add_argument("--epsilon", type=cli.positive, default=DATA["epsilon"], help="ε: a sample has <x, v> = ε or −ε")
    cli.add_recipe_arguments(parser, RECIPE)
    default = "runs/directional_bias/ARCH-DIRECTIONS, or runs/steps/… with --measure steps"
    cli.add_run_arguments(parser, output_help=f"folder of the run (default: {default})", workers=True)
    parser.add_argument("--seeds", type=cli.positive_int, default=1, help="trainings for each direction")
    parser.add_argument("--published", type=cli.path, help="CSV file of published accuracies to compare with")
    args = parser.parse_args(argv)
    if args.measure == "steps":
        parser.set_defaults(**STEPS_DEFAULTS)
        args = parser.parse_args(argv)
        if args.published:
            parser.error("--published belongs to --measure accuracy: no steps are published")
    cli.finish(parser, args)
    finish_direction_arguments(args, parser)
    steps = args.measure == "steps"
    name = f"steps/{folder_name(args, STEPS_DEFAULTS['sigma'])}" if steps else f"directional_bias/{folder_name(args)}"
    args.output = args.output or Path("runs") / name
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check everything, train on every direction that the run's folder lacks, and report."""
    args = parse_arguments(argv)
    columns = KEYS[args.directions], canonical_name(args.arch)
    published = tables.read_published(args.published, *columns) if args.published else []
    directions = make_directions(args)
    keys, what = (*KEYS[args.directions], "repetition"), f"{paper_name(args.arch)}, trainings"
    items = [(*index, repetition) for repetition in range(args.seeds) for index in directions]
    small = workers.is_small(check(args), args.device)
    defaults = runs.settings(parse_arguments([])) | {"precision": "fp32"}
    runs.open_run(args.output, settings(args), defaults)
    runs.share(__file__, argv, args, keys, items, what=what, small=small, memory=2 * memory_of_samples(args))
    device = workers.own_device(args.device)

    options = {key: vars(args)[key] for key in ("arch", "precision", "sigma", *DATA, *RECIPE)}
    options |= {"pooling": not args.no_pooling, "until_loss": UNTIL_LOSS if args.measure == "steps" else None}

    def train_item(item: runs.Item, checkpoint: Path) -> dict[str, float]:
        *index, _ = item
        seed = seeding.seed_of(args.seed, args.directions, *item)
        return train_on_direction(directions[tuple(index)].to(device), seed=seed, checkpoint=checkpoint, **options)

    rows = runs.do_items(args.output, keys, items, train_item, what=what, device=device)
    if rows:
        report(rows, published, args)


if __name__ == "__main__":
    main()
