"""Not in the paper: which directions will an architecture learn? A few untrained networks rank them in seconds.

    python predict.py --arch resnet18

shows each untrained network the two classes of D(v), x ± s·v, for the 130 directions v of the published map, and takes
the squared difference of its features. The mean over networks, divided by the same for random directions, is the
relative sensitivity to v: for ResNet-18, 0.15 to 17. Most networks learn directions where it is above about 0.5.

    python predict.py --arch lenet --against dft_accuracies.csv

also says how well that ranks accuracies: those of a run of experiment 1 (its folder), or the authors' published ones.
Expect an AUC (fraction of learnt and unlearnt pairs in the right order) of 0.99 or more. Its limits: studies/README.md.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import utils.startup  # noqa: F401

# isort: split

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import directional_bias
from directional_bias import KEYS, SIGMA, Accuracies, key_of, title_name
from models import build_model, canonical_name, checked, paper_name
from refusals import Refusal
from utils import cli, plotting, runs, seeding, tables
from utils.directions import random_direction
from utils.last_layer import draw_network, estimator_for, network_rows

STEP = 10.0  # rms of s·v over the pixels: well above the noise σ, so that v stands out
NUM_RANDOM = 64  # random directions, whose mean is a sensitivity of 1
NUM_NETWORKS = {"marginal": 4, "sampled": 200}  # with the last layer integrated out, or the network sampled whole
LEARNT, UNLEARNT = 75.0, 55.0  # test accuracy (%) above which a direction is learnt, and up to which it is not
THRESHOLD = 0.5  # most networks learn the directions above it, at σ = 3
# Settings of a run of experiment 1 that a comparison needs to be the same.
RUN_SETTINGS = ("arch", "num_channels", "image_size", "no_pooling", "directions", "phase", "sigma")


def squared_differences(
    directions: torch.Tensor,
    *,
    arch: str | Callable = "lenet",
    pooling: bool = True,
    num_networks: int = NUM_NETWORKS["marginal"],
    sigma: float = SIGMA,
    step: float = STEP,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """‖Δ‖², Δ = (h(x + s·v) − h(x − s·v)) / 2s, of untrained networks along unit vectors v (n, C, S, S).

    h are the features before the last layer, or the output of a network that does not end in a linear layer. Each
    network has a point x ~ N(0, σ²I) of its own, and s makes s·v of rms `step`. Returns ‖Δ‖² along each v (N, n), and
    its mean over NUM_RANDOM random directions (N,), one row per network.
    """
    num_channels, image_size, _ = shape = directions[0].shape
    device, s = directions.device, step * math.sqrt(shape.numel())
    build, rows = partial(build_model, arch, num_channels, 1, image_size, pooling), []
    for number in tqdm(range(num_networks), desc=f"{paper_name(arch)}, untrained networks", delay=1):
        draws = seeding.generator("cpu", seed, "point of prediction", number)
        point = (sigma * torch.randn(shape, generator=draws)).to(device)
        others = torch.stack([random_direction(shape, draws) for _ in range(NUM_RANDOM)]).to(device)
        network = draw_network(build, device, seed, "network", number)
        how = {"estimator": estimator_for(network, point), "step": s}
        differences = network_rows(network, point, directions=torch.cat([directions, others]), **how)  # (F, n + 64)
        rows.append(differences.double().square().sum(0).cpu().numpy())
    along, random = np.split(np.stack(rows), [len(directions)], axis=1)
    return along, random.mean(1)


def relative_sensitivity(along: np.ndarray, random: np.ndarray) -> np.ndarray:
    """E‖Δ‖² along each direction, divided by that along random ones, (n,), from what `squared_differences` returns."""
    if not random.sum() > 0:
        raise Refusal("the untrained networks do not see their input: the differences of their features are all zero")
    return along.sum(0) / random.sum()


def ranking(scores: np.ndarray, accuracies: np.ndarray) -> dict[str, float]:
    """How scores rank test accuracies (%), shapes (n,); nan where there is nothing to compare.

    auc: the fraction of (learnt, unlearnt) pairs that the scores rank correctly. spearman: the rank correlation.
    largest_unlearnt, smallest_learnt: scores.
    """
    learnt, unlearnt = scores[accuracies > LEARNT], scores[accuracies <= UNLEARNT]
    pairs, vary = len(learnt) * len(unlearnt), len(scores) > 2 and np.ptp(scores) > 0 and np.ptp(accuracies) > 0
    return {
        "auc": stats.mannwhitneyu(learnt, unlearnt).statistic / pairs if pairs else math.nan,
        "spearman": stats.spearmanr(scores, accuracies).statistic if vary else math.nan,
        "largest_unlearnt": unlearnt.max() if len(unlearnt) else math.nan,
        "smallest_learnt": learnt.min() if len(learnt) else math.nan,
    }


def read_measured(path: Path, args: Namespace) -> tuple[str, Accuracies]:
    """What was measured, "accuracy" or "steps", and its values by direction: of a run of experiment 1, or published.

    `path` is a run's folder, a table like its accuracies.csv, or the authors' file. A direction that was not learnt
    within the run has infinitely many steps.

    Raises:
        Refusal: there are none, or the run has other directions than `args`.
    """
    keys = KEYS[args.directions]
    if (path / runs.CONFIG).exists():
        trained, asked = runs.read_config(path), directional_bias.settings(args)
        same = (*RUN_SETTINGS, *{"random": ["seed"], "nads": ["nads"]}.get(args.directions, []))
        if differing := [name for name in same if trained.get(name, asked[name]) != asked[name]]:
            changes = "; ".join(f"{name} {trained[name]!r}, not {asked[name]!r}" for name in differing)
            raise Refusal(f"the run in {path} has {changes}")
    rows = tables.read_rows(path / runs.ROWS if path.is_dir() else path)
    if path.is_dir() and not rows:
        raise Refusal(f"{path} has no {runs.ROWS}: expected the folder of a run of directional_bias.py")
    if rows and "steps" in rows[0]:
        return "steps", list(directional_bias.mean_steps(rows, keys).items())
    if rows and {*keys, "test_accuracy"} <= rows[0].keys():
        return "accuracy", list(tables.means(rows, keys).items())
    return "accuracy", tables.read_published(path, keys, canonical_name(args.arch))


def compare(sensitivity: Mapping[tuple[int, ...], float], measure: str, values: Accuracies, args: Namespace) -> None:
    """How the sensitivities rank what was measured, beside the rule of low frequencies: print, draw, comparison.csv."""
    common = [(index, key_of(index, args), y) for index, y in values if key_of(index, args) in sensitivity]
    if not common:
        raise Refusal(f"{args.against} has none of these directions")
    x, y = np.array([(sensitivity[key], value) for _, key, value in common]).T
    scores = {"relative sensitivity": x}
    if args.directions == "fourier":
        scores["the lower the frequency, the easier"] = -np.hypot(*np.array([index for index, _, _ in common]).T)
    print(f"against {len(y)} directions of {args.against}:")
    if measure == "steps":
        learnt = np.isfinite(y)
        parts = {"spearman": slice(None), "spearman_of_learnt": learnt}
        found = {
            name: {key: stats.spearmanr(score[part], y[part]).statistic for key, part in parts.items()}
            for name, score in scores.items()
        }
        for name, row in found.items():
            both = f"{row['spearman']:.3f}, {row['spearman_of_learnt']:.3f} among the {learnt.sum()} learnt"
            print(f"{name}: rank correlation with the steps {both}")
        x, y = x[learnt], y[learnt]
    else:
        print(f"{(y > LEARNT).sum()} learnt (above {LEARNT:g} %), {(y <= UNLEARNT).sum()} not (up to {UNLEARNT:g} %)")
        found = {name: ranking(score, y) for name, score in scores.items()}
        for name, row in found.items():
            print(f"{name}: AUC {row['auc']:.3f}, rank correlation {row['spearman']:.3f}")
        ends = found["relative sensitivity"]
        print(
            f"relative sensitivity to unlearnt directions up to {ends['largest_unlearnt']:.2g}, "
            f"to learnt ones from {ends['smallest_learnt']:.2g}"
        )
    rows = [{"score": name} | {key: f"{value:.4f}" for key, value in row.items()} for name, row in found.items()]
    tables.write_rows(args.output / "comparison.csv", rows)
    labels = {"xlabel": plotting.LABELS["sensitivity"], "ylabel": plotting.LABELS[measure], "xscale": "log"}
    labels |= {"yscale": "log"} if measure == "steps" else {}
    figure = plotting.scatters_figure({title_name(args): (x, y)}, **labels)
    plotting.save_figure(figure, args.output / f"predicted_and_{measure}.png")


def report(sensitivity: Mapping[tuple[int, ...], float], args: Namespace) -> None:
    """Write predicted.csv, and draw the map or the curve."""
    args.output.mkdir(parents=True, exist_ok=True)
    keys, values = KEYS[args.directions], np.array(list(sensitivity.values()))
    rows = [dict(zip(keys, v, strict=True)) | {"sensitivity": f"{value:.6g}"} for v, value in sensitivity.items()]
    tables.write_rows(args.output / "predicted.csv", rows)
    title = f"Relative sensitivity of untrained {title_name(args)}"
    if args.directions == "fourier":
        figure = plotting.map_figure(sensitivity, args.image_size, title, scale="sensitivity")
    else:
        labels = {"xlabel": keys[0].replace("_", " ").replace("nad", "NAD"), "ylabel": "relative sensitivity"}
        order = np.array([index[0] for index in sensitivity])
        figure = plotting.curve_figure(order, {paper_name(args.arch): values}, title=title, yscale="log", **labels)
    plotting.save_figure(figure, args.output / "predicted.png")
    print(
        f"relative sensitivity to {len(values)} directions: {values.min():.3g} to {values.max():.3g}, "
        f"{(values < THRESHOLD).sum()} of them below {THRESHOLD:g}\n"
        f"figure: {args.output / 'predicted.png'}\nrows: {args.output / 'predicted.csv'}"
    )


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--no-pooling", action="store_true", help="remove all pooling: LeNet and ResNet-18 only")
    directional_bias.add_direction_arguments(parser)
    several = "untrained networks (default: 4; 200 if the architecture does not end in a linear layer)"
    parser.add_argument("--num-networks", type=cli.positive_int, help=several)
    against = "compare with a run of experiment 1 (its folder), or with a CSV file of published accuracies"
    parser.add_argument("--against", type=cli.path, help=against)
    cli.add_run_arguments(parser, output_help="folder (default: runs/predict/ARCH-DIRECTIONS)")
    args = parser.parse_args(argv)
    cli.finish(parser, args)
    directional_bias.finish_direction_arguments(args, parser)
    args.output = args.output or Path("runs/predict") / directional_bias.folder_name(args)
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Predict, report, and compare if asked to."""
    args = parse_arguments(argv)
    directions = directional_bias.make_directions(args)
    measured = read_measured(args.against, args) if args.against else None
    stacked, pooling = torch.stack(list(directions.values())).to(args.device), not args.no_pooling
    build = partial(build_model, args.arch, args.num_channels, 1, args.image_size, pooling)
    network = checked(build, args.arch, stacked[0].shape, 1)
    if args.num_networks is None:
        args.num_networks = NUM_NETWORKS[estimator_for(network.eval(), stacked[0].cpu())]
    start = time.monotonic()
    runs.announce(f"{paper_name(args.arch)}, untrained networks", args.num_networks, 0, args.device, args.output)
    options = {"arch": args.arch, "pooling": pooling, "num_networks": args.num_networks}
    values = relative_sensitivity(*squared_differences(stacked, sigma=args.sigma, seed=args.seed, **options))
    print(f"{time.monotonic() - start:.1f} s")
    sensitivity = dict(zip(directions, values.tolist(), strict=True))
    report(sensitivity, args)
    if measured:
        compare(sensitivity, *measured, args)


if __name__ == "__main__":
    main()
