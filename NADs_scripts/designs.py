"""A test that the prediction can fail: LeNet changed in one thing, twelve times, and two networks of torchvision.

    python NADs_scripts/designs.py              # predicts, if results/designs/predictions.csv is not there
    python NADs_scripts/designs.py --train all  # trains, then holds the predictions against the accuracies

The predictions of the last three, tanh, average_then_max and overlapping, came before their training. Those of the
others did, too, by the first definition of the share; today's are younger than the trainings. The twelve are
trained on the whole map, which is 45 cells: transposes are one experiment for them, mirror images nearly (three were
trained on both transposes; where there are several, means are compared). The two of torchvision are trained on ten
cells that had spanned their shares by the first definition; all in bf16, a variant of the recipe.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import directional_bias
from directional_bias import KEYS, LEARNT, ROOT, UNLEARNT, auc, limits, share, variance_along
from utils import cli, plotting, runs, tables
from utils.directions import canonical_frequency, fourier_map

RUNS = ROOT / "runs" / "designs"
FREQUENCY = KEYS["fourier"]
NUM_NETWORKS = 8  # untrained ones for each prediction


def lenet(num_classes: int, *stages: nn.Module, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """These stages, and LeNet's three linear layers on top of them."""
    trunk = nn.Sequential(*stages, nn.Flatten()).eval()
    width = trunk(torch.zeros(1, 1, 32, 32)).shape[1]
    head = (nn.Linear(width, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, num_classes))
    return nn.Sequential(trunk, *head)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to images of the same shape."""
        return x + super().forward(x)


def conv(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    """LeNet's convolution, 5×5 and unpadded."""
    return nn.Conv2d(inputs, outputs, 5, **options)


def average_pool(num_classes: int) -> nn.Module:
    """Average pools instead of max-pools."""
    return lenet(num_classes, conv(1, 6), nn.ReLU(), nn.AvgPool2d(2), conv(6, 16), nn.ReLU(), nn.AvgPool2d(2))


def strided(num_classes: int) -> nn.Module:
    """Convolutions of stride 2 instead of the pools."""
    return lenet(num_classes, conv(1, 6, stride=2), nn.ReLU(), conv(6, 16, stride=2), nn.ReLU())


def blur_pool(num_classes: int) -> nn.Module:
    """The maximum over 2×2 pixels everywhere, blurred by (1, 2, 1)/4 before every second is taken (Zhang, 2019)."""
    pool = nn.Sequential(nn.MaxPool2d(2, stride=1), nn.AvgPool2d(2, stride=1), nn.AvgPool2d(2))
    return lenet(num_classes, conv(1, 6), nn.ReLU(), pool, conv(6, 16), nn.ReLU(), pool)


def no_pooling(num_classes: int) -> nn.Module:
    """No pools, as in the paper's ablation."""
    return lenet(num_classes, conv(1, 6), nn.ReLU(), conv(6, 16), nn.ReLU())


def one_pool_of_4(num_classes: int) -> nn.Module:
    """One 4×4 max-pool instead of two of 2×2."""
    return lenet(num_classes, conv(1, 6), nn.ReLU(), nn.MaxPool2d(4), conv(6, 16), nn.ReLU())


def patches(num_classes: int) -> nn.Module:
    """An embedding of 4×4 patches instead of the first convolution and the pools."""
    return lenet(num_classes, nn.Conv2d(1, 6, 4, stride=4), nn.ReLU(), conv(6, 16), nn.ReLU())


def skip(num_classes: int) -> nn.Module:
    """A residual block before the first pool."""
    block = Residual(conv(6, 6, padding=2), nn.ReLU())
    first = conv(1, 6), nn.ReLU(), block, nn.MaxPool2d(2)
    return lenet(num_classes, *first, conv(6, 16), nn.ReLU(), nn.MaxPool2d(2))


def batch_norm(num_classes: int) -> nn.Module:
    """Batch norm after each convolution."""
    first = conv(1, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
    return lenet(num_classes, *first, conv(6, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))


def gelu(num_classes: int) -> nn.Module:
    """GELU instead of ReLU."""
    stages = conv(1, 6), nn.GELU(), nn.MaxPool2d(2), conv(6, 16), nn.GELU(), nn.MaxPool2d(2)
    return lenet(num_classes, *stages, activation=nn.GELU)


def tanh(num_classes: int) -> nn.Module:
    """Hyperbolic tangents instead of ReLU."""
    stages = conv(1, 6), nn.Tanh(), nn.MaxPool2d(2), conv(6, 16), nn.Tanh(), nn.MaxPool2d(2)
    return lenet(num_classes, *stages, activation=nn.Tanh)


def average_then_max(num_classes: int) -> nn.Module:
    """An average pool instead of the first max-pool."""
    return lenet(num_classes, conv(1, 6), nn.ReLU(), nn.AvgPool2d(2), conv(6, 16), nn.ReLU(), nn.MaxPool2d(2))


def overlapping(num_classes: int) -> nn.Module:
    """Max-pools over 3×3 pixels at every second one."""
    return lenet(num_classes, conv(1, 6), nn.ReLU(), nn.MaxPool2d(3, 2), conv(6, 16), nn.ReLU(), nn.MaxPool2d(3, 2))


DESIGNS = [average_pool, strided, blur_pool, no_pooling, one_pool_of_4, patches, skip, batch_norm, gelu]
DESIGNS += [tanh, average_then_max, overlapping]
WHOLE = {"LeNet": "lenet"} | {design.__name__: f"NADs_scripts.designs:{design.__name__}" for design in DESIGNS}
CELLS = {  # (k_y, k_x) for torchvision's networks: ten that spanned their shares by the first definition
    "regnet_x_400mf": "0,0 -2,-12 -4,0 -6,-2 -6,-14 -8,-12 -10,-10 -12,-8 -14,-12 -16,-4",
    "googlenet": "0,-4 0,-16 -2,-6 -2,-12 -2,-16 -4,-4 -12,-6 -12,-8 -12,-14 -16,-6",
}
TEN_CELLS = {name: f"torchvision:{name}" for name in CELLS}


def quarter_map() -> dict[tuple[int, int], torch.Tensor]:
    """Fourier images of the map, one for each pair (k_y, ±k_x) of mirror images: 81 of 32×32 pixels."""
    half = range(0, 17, 2)
    return fourier_map(frequencies=[(y, x) for y in half for x in half])


def predict(path: Path) -> None:
    """Write one row for each network and cell."""
    images, rows = quarter_map(), []
    directions = torch.stack(list(images.values()))
    for name, arch in (WHOLE | TEN_CELLS).items():
        shares = share(*variance_along(directions, arch=arch, num_networks=NUM_NETWORKS))
        for key, value in zip(images, shares, strict=True):
            rows.append({"network": name} | dict(zip(FREQUENCY, key, strict=True)) | {"share": f"{value:.5g}"})
        print(f"{name}: shares {shares.min():.3g} to {shares.max():.3g}", flush=True)
    tables.write_rows(path, rows)


def train(folder: Path, only: str) -> None:
    """Train on the cells of one network, or of all, by experiment 1."""
    whole = [f"{y},{x}" for y, x in quarter_map() if abs(y) <= abs(x)]
    for name, arch in (WHOLE | TEN_CELLS).items():
        if name != "LeNet" and only in (name, "all"):
            cells = CELLS[name].split() if name in CELLS else whole
            frequencies = [text for cell in cells for text in ("--frequency", *cell.split(","))]
            options = ["--arch", arch, "--precision", "bf16", "--output", str(folder / name)]
            directional_bias.main([*options, *frequencies])


def collect(folder: Path, output: Path) -> dict[str, dict[tuple[int, int], float]]:
    """Test accuracy (%) by network and cell: what is new in `folder` goes to accuracies.csv, where the rest is.

    LeNet's are those of results/, in fp32.
    """
    path = output / "accuracies.csv"
    kept = {(row["network"], key_of(row)): row for row in tables.read_rows(path, FREQUENCY)}
    for name in WHOLE | TEN_CELLS:
        new = tables.read_rows(folder / name / runs.ROWS, FREQUENCY)
        kept |= {(name, key_of(row)): {"network": name} | row for row in new}
    names = list(WHOLE | TEN_CELLS)
    ordered = sorted(kept, key=lambda which: (names.index(which[0]), which[1]))
    if ordered:
        tables.write_rows(path, [kept[which] for which in ordered])
    whole = tables.read_rows(ROOT / "results" / "directional_bias" / "LeNet-fourier" / runs.ROWS, FREQUENCY)
    accuracies = {"LeNet": {key_of(row): float(row["test_accuracy"]) for row in whole}}
    for name, key in ordered:
        accuracies.setdefault(name, {})[key] = float(kept[name, key]["test_accuracy"])
    return accuracies


def key_of(row: dict[str, str]) -> tuple[int, int]:
    """The frequency of a row."""
    return int(row["frequency_y"]), int(row["frequency_x"])


def folded(values: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """The mean over the transposes and mirror images of each cell, by 0 ≤ k_1 ≤ k_2."""
    groups: dict[tuple[int, int], list[float]] = {}
    for key, value in values.items():
        groups.setdefault(tuple(sorted(map(abs, key))), []).append(value)
    return {key: float(np.mean(group)) for key, group in groups.items()}


def unfolded(values: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """The value of each cell for all of its transposes and mirror images."""
    both = {key: value for (y, x), value in values.items() for key in ((y, x), (x, y))}
    return {canonical_frequency(y, sign * x): value for (y, x), value in both.items() for sign in (1, -1)}


def summary(shares: dict[tuple[int, int], float], accuracies: dict[tuple[int, int], float]) -> dict[str, str | int]:
    """How well the shares rank the cells of one network; without learnt or unlearnt cells there is no AUC."""
    cells = [key for key, accuracy in accuracies.items() if math.isfinite(accuracy)]
    accuracy, values = np.array([[accuracies[key], shares[key]] for key in cells]).T
    above = accuracy > UNLEARNT
    row = {"cells": len(cells), "learnt": int((accuracy > LEARNT).sum()), "unlearnt": int((~above).sum())}
    row |= {"lowest": f"{accuracy.min():.1f}", "highest": f"{accuracy.max():.1f}"}
    numbers = {"auc_share": auc(values, accuracy)}
    numbers["auc_low_frequency"] = auc(np.array([-math.hypot(*key) for key in cells]), accuracy)
    few = above.sum() < 3
    numbers["spearman_above_chance"] = math.nan if few else stats.spearmanr(values[above], accuracy[above])[0]
    numbers["unlearnt_up_to"], numbers["learnt_from"] = limits(values, accuracy)
    return row | {name: f"{value:.3f}" if math.isfinite(value) else "" for name, value in numbers.items()}


def report(rows: list[dict[str, str]], accuracies: dict[str, dict[tuple[int, int], float]], output: Path) -> None:
    """Write the table, print it, and draw the maps and the accuracies over the shares."""
    table, maps, panels = [], {}, {}
    for name, found in accuracies.items():
        own = [row for row in rows if row["network"] == name]
        shares, trained = folded({key_of(row): float(row["share"]) for row in own}), folded(found)
        table.append({"network": name} | summary(shares, trained))
        print(", ".join(f"{key} {value}" for key, value in table[-1].items() if value != ""))
        if name in WHOLE:
            maps[name] = (unfolded(shares), unfolded(trained), {})
        pairs = [(shares[key], accuracy) for key, accuracy in trained.items()]
        panels[f"{name}\nAUC {table[-1]['auc_share'] or '–'}"] = np.array(pairs).T
    tables.write_rows(output / "summary.csv", table)
    new = [row for row in table if row["network"] in WHOLE and row["network"] != "LeNet"]
    aucs = [float(row["auc_share"]) for row in new if row["auc_share"]]
    unranked = ", ".join(row["network"] for row in new if not row["auc_share"])
    if aucs:
        print(
            f"AUC over {len(aucs)} new networks: median {np.median(aucs):.3f}, from {min(aucs):.3f} to {max(aucs):.3f}"
        )
    print(f"networks without both learnt and unlearnt cells: {unranked or 'none'}")
    plotting.save_figure(plotting.prediction_figure(maps, 32), output / "maps.png")
    labels = {"xlabel": "predicted share", "ylabel": "test accuracy (%)", "xscale": "log", "ylim": (45, 102)}
    plotting.save_figure(plotting.scatters_figure(panels, **labels), output / "accuracies.png")
    print(f"tables and figures: {output}")


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Predict if that has not been done, train if asked, report."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--train", choices=["all", *list(WHOLE)[1:], *TEN_CELLS], help="train this one")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "designs", help="folder")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "predictions.csv").exists():
        predict(args.output / "predictions.csv")
    rows = tables.read_rows(args.output / "predictions.csv", FREQUENCY)
    if lacking := (WHOLE | TEN_CELLS).keys() - {row["network"] for row in rows}:
        raise ValueError(f"{args.output}/predictions.csv lacks {', '.join(lacking)}: delete it to predict anew")
    if args.train:
        train(RUNS, args.train)
    report(rows, collect(RUNS, args.output), args.output)


if __name__ == "__main__":
    main()
