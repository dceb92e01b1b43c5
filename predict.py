"""Not in the paper: which directions will an architecture learn? A few untrained networks tell their order in seconds.

    python predict.py --arch resnet18

shows each untrained network the two classes of D(v), x ± s·v, for the 130 directions v of the published map. The
squared difference of its features, in the mean over networks, divided by the same for random directions, is the
relative sensitivity to v. Expect for ResNet-18 0.15 to 17. Most networks learn the directions above about 0.5.

    python predict.py --arch lenet --against fourier_accuracies.csv

also says how well that ranks accuracies: those of a run of experiment 1 (its folder), or the authors' published ones.
Expect an AUC of 1.000 for ResNet-18 and, by seed, 0.993 to 1.000 for LeNet. Its limits stand in studies/README.md.
"""

import math
import time
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import directional_bias
from directional_bias import KEYS, SIGMA, Accuracies, key_of, title_name
from models import build_model, canonical_name, identity, paper_name
from refusals import Refusal
from utils import cli, files, plotting, seeding, tables
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
    arch: str = "lenet",
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
    for number in tqdm(range(num_networks), desc=f"{arch}, untrained networks", delay=1):
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


def read_accuracies(path: Path, args: Namespace) -> Accuracies:
    """Test accuracies of a run of experiment 1, given its folder or a table like its accuracies.csv; or published ones.

    Refusal if there are none, or if the run has other directions than `args`.
    """
    keys = KEYS[args.directions]
    if (path / "config.json").exists():
        trained = files.read_json(path / "config.json", "settings")["settings"]
        asked = vars(args) | {"arch": identity(args.arch)}
        same = RUN_SETTINGS + ("seed",) * (args.directions == "random")
        if differing := [name for name in same if trained.get(name, asked[name]) != asked[name]]:
            changes = "; ".join(f"{name} {trained[name]!r}, not {asked[name]!r}" for name in differing)
            raise Refusal(f"the run in {path} has {changes}")
    rows = tables.read_rows(path / "accuracies.csv" if path.is_dir() else path)
    if path.is_dir() and not rows:
        raise Refusal(f"{path} has no accuracies.csv: expected the folder of a run of directional_bias.py")
    if rows and {*keys, "test_accuracy"} <= rows[0].keys():
        return list(tables.means(rows, keys).items())
    return tables.read_published(path, keys, canonical_name(args.arch))


def compare(sensitivity: Mapping[tuple[int, ...], float], accuracies: Accuracies, args: Namespace) -> None:
    """Print how the sensitivities rank these accuracies, and draw them."""
    common = [(index, key_of(index, args), y) for index, y in accuracies if key_of(index, args) in sensitivity]
    if not common:
        raise Refusal(f"{args.against} has none of these directions")
    x, y = np.array([(sensitivity[key], accuracy) for _, key, accuracy in common]).T
    found = ranking(x, y)
    learnt, unlearnt = f"{(y > LEARNT).sum()} above {LEARNT:g} %", f"{(y <= UNLEARNT).sum()} up to {UNLEARNT:g} %"
    print(f"{len(y)} accuracies of {args.against}: {learnt} (learnt), {unlearnt} (unlearnt)")
    print(f"relative sensitivity: AUC {found['auc']:.3f}, rank correlation {found['spearman']:.3f}")
    if args.directions == "fourier":
        rule = ranking(-np.hypot(*np.array([index for index, _, _ in common]).T), y)
        print(f"the lower the frequency, the easier: AUC {rule['auc']:.3f}, rank correlation {rule['spearman']:.3f}")
    ends = found["largest_unlearnt"], found["smallest_learnt"]
    print("relative sensitivity to unlearnt directions up to {:.2g}, to learnt ones from {:.2g}".format(*ends))
    labels = {"xlabel": "relative sensitivity", "ylabel": "test accuracy (%)", "xscale": "log"}
    figure = plotting.scatters_figure({title_name(args): (x, y)}, **labels)
    plotting.save_figure(figure, args.output / "predicted_and_accuracies.png")
    print(f"figure: {args.output / 'predicted_and_accuracies.png'}")


def report(sensitivity: Mapping[tuple[int, ...], float], args: Namespace) -> None:
    """Write predicted.csv, and draw the map or the curve."""
    args.output.mkdir(parents=True, exist_ok=True)
    keys, values = KEYS[args.directions], np.array(list(sensitivity.values()))
    rows = [dict(zip(keys, v, strict=True)) | {"sensitivity": f"{value:.6g}"} for v, value in sensitivity.items()]
    tables.write_rows(args.output / "predicted.csv", rows)
    title = f"Relative sensitivity of untrained {title_name(args)}"
    if args.directions == "fourier":
        figure = plotting.map_figure(sensitivity, args.image_size, title, sensitivity=True)
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
    parser.add_argument("--no-pooling", action="store_true", help="the ablation without pooling: LeNet, ResNet-18")
    directional_bias.add_direction_arguments(parser)
    several = "untrained networks (default: 4; 200 if the architecture does not end in a linear layer)"
    parser.add_argument("--num-networks", type=cli.positive_int, help=several)
    parser.add_argument("--against", type=Path, help="a run's folder, or a CSV of accuracies, to compare with")
    parser.add_argument("--seed", type=cli.natural, default=0, help="random seed")
    cli.add_device_argument(parser)
    parser.add_argument("--output", type=Path, help="folder (default: runs/predict/ARCH-DIRECTIONS)")
    args = parser.parse_args(argv)
    directional_bias.finish_direction_arguments(args, parser)
    args.output = args.output or Path("runs/predict") / directional_bias.folder_name(args)
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Predict, report, and compare if asked to."""
    args = parse_arguments(argv)
    directions = directional_bias.make_directions(args)
    accuracies = read_accuracies(args.against, args) if args.against else []
    stacked, pooling = torch.stack(list(directions.values())).to(args.device), not args.no_pooling
    if args.num_networks is None:
        network = build_model(args.arch, args.num_channels, 1, args.image_size, pooling).eval()
        args.num_networks = NUM_NETWORKS[estimator_for(network, stacked[0].cpu())]
    print(f"{args.arch}, untrained networks: {args.num_networks}; {args.device}", flush=True)
    options = {"arch": args.arch, "pooling": pooling, "num_networks": args.num_networks}
    start = time.monotonic()
    values = relative_sensitivity(*squared_differences(stacked, sigma=args.sigma, seed=args.seed, **options))
    print(f"{time.monotonic() - start:.1f} s")
    sensitivity = dict(zip(directions, values.tolist(), strict=True))
    report(sensitivity, args)
    if args.against:
        compare(sensitivity, accuracies, args)


if __name__ == "__main__":
    main()
