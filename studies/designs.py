"""LeNet changed in one thing, twelve times, and two networks of torchvision: does the order hold for them?

    python studies/designs.py              # tables and figures from what is in results/studies/designs/, in seconds
    python studies/designs.py --train all  # train them first, in bf16 (6 core-hours); it continues

The twelve are trained on the 45 cells of the map that transposes and mirror images leave; where more were trained,
their mean counts. The two of torchvision are trained on ten cells. Expect an AUC of 1.000 wherever there is one.
"""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import directional_bias
from directional_bias import KEYS
from predict import LEARNT, UNLEARNT, ranking, relative_sensitivity, squared_differences
from studies import RESULTS
from utils import cli, plotting, runs, tables
from utils.directions import canonical_frequency, fourier_map

RUNS = Path("runs/studies/designs")
FREQUENCY = KEYS["fourier"]
NUM_NETWORKS = 8  # untrained ones for each prediction

Cells = dict[tuple[int, int], float]  # values by frequency


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to images of the same shape."""
        return x + super().forward(x)


conv, max2, average2 = partial(nn.Conv2d, kernel_size=5), partial(nn.MaxPool2d, 2), partial(nn.AvgPool2d, 2)
max3, max4, none = partial(nn.MaxPool2d, 3, 2), partial(nn.MaxPool2d, 4), nn.Identity


def blurred() -> nn.Module:
    """The maximum over 2×2 pixels everywhere, blurred by (1, 2, 1)/4 before every second is taken (Zhang, 2019)."""
    return nn.Sequential(nn.MaxPool2d(2, stride=1), nn.AvgPool2d(2, stride=1), nn.AvgPool2d(2))


def residual_max2() -> nn.Module:
    """A residual block, then a 2×2 max-pool."""
    return nn.Sequential(Residual(conv(6, 6, padding=2), nn.ReLU()), max2())


def lenet(num_classes: int, patches=False, stride=1, norm=none, activation=nn.ReLU, pools=(max2, max2)) -> nn.Module:
    """LeNet, with factories of other layers in place of some."""
    pool1, pool2 = (pool() for pool in pools)
    first = nn.Conv2d(1, 6, 4, stride=4) if patches else conv(1, 6, stride=stride)
    stage1 = first, norm(6), activation(), pool1
    stage2 = conv(6, 16, stride=stride), norm(16), activation(), pool2
    trunk = nn.Sequential(*stage1, *stage2, nn.Flatten()).eval()
    width = trunk(torch.zeros(1, 1, 32, 32)).shape[1]
    head = nn.Linear(width, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, num_classes)
    return nn.Sequential(trunk, *head)


DESIGNS = {  # what is changed in LeNet
    "average_pool": ("average pools instead of max-pools", {"pools": (average2, average2)}),
    "strided": ("convolutions of stride 2 instead of the pools", {"stride": 2, "pools": (none, none)}),
    "blur_pool": ("2×2 maxima everywhere, blurred before every second is taken", {"pools": (blurred, blurred)}),
    "no_pooling": ("no pools, as in the paper's ablation", {"pools": (none, none)}),
    "one_pool_of_4": ("one 4×4 max-pool instead of two of 2×2", {"pools": (max4, none)}),
    "patches": ("4×4 patches instead of the first convolution and pools", {"patches": True, "pools": (none, none)}),
    "skip": ("a residual block before the first pool", {"pools": (residual_max2, max2)}),
    "batch_norm": ("batch norm after each convolution", {"norm": nn.BatchNorm2d}),
    "gelu": ("GELU instead of ReLU", {"activation": nn.GELU}),
    "tanh": ("hyperbolic tangents instead of ReLU", {"activation": nn.Tanh}),
    "average_then_max": ("an average pool instead of the first max-pool", {"pools": (average2, max2)}),
    "overlapping": ("max-pools over 3×3 pixels at every second one", {"pools": (max3, max3)}),
}
globals().update({name: partial(lenet, **changes) for name, (_, changes) in DESIGNS.items()})  # for --arch
WHOLE_MAP = {"LeNet": "lenet"} | {name: f"studies.designs:{name}" for name in DESIGNS}
CELLS = {  # (k_y, k_x) for torchvision's networks
    "regnet_x_400mf": "0,0 -2,-12 -4,0 -6,-2 -6,-14 -8,-12 -10,-10 -12,-8 -14,-12 -16,-4",
    "googlenet": "0,-4 0,-16 -2,-6 -2,-12 -2,-16 -4,-4 -12,-6 -12,-8 -12,-14 -16,-6",
}
NETWORKS = WHOLE_MAP | {name: f"torchvision:{name}" for name in CELLS}


def quarter_map() -> dict[tuple[int, int], torch.Tensor]:
    """Fourier images of the map, one for each pair (k_y, ±k_x) of mirror images: 81 of 32×32 pixels."""
    half = range(0, 17, 2)
    return fourier_map(frequencies=[(y, x) for y in half for x in half])


def predict(path: Path) -> None:
    """Write one row for each network and cell."""
    images, rows = quarter_map(), []
    directions = torch.stack(list(images.values()))
    for name, arch in NETWORKS.items():
        values = relative_sensitivity(*squared_differences(directions, arch=arch, num_networks=NUM_NETWORKS))
        for key, value in zip(images, values, strict=True):
            rows.append({"network": name} | dict(zip(FREQUENCY, key, strict=True)) | {"sensitivity": f"{value:.5g}"})
        print(f"{name}: done", flush=True)
    tables.write_rows(path, rows)


def train(name: str, path: Path) -> None:
    """Train one network on its cells by experiment 1; its rows take the place of those it has in the table."""
    whole = " ".join(f"{y},{x}" for y, x in quarter_map() if abs(y) <= abs(x))
    frequencies = [text for cell in CELLS.get(name, whole).split() for text in ("--frequency", *cell.split(","))]
    options = ["--arch", NETWORKS[name], "--precision", "bf16", "--output", str(RUNS / name)]
    directional_bias.main([*options, *frequencies])
    new = [{"network": name} | row for row in tables.read_rows(RUNS / name / "accuracies.csv", FREQUENCY)]
    others = [row for row in tables.read_rows(path, FREQUENCY) if row["network"] != name]
    rows = [{column: row[column] for column in ("network", *FREQUENCY, "test_accuracy")} for row in [*others, *new]]
    tables.write_rows(path, sorted(rows, key=lambda row: list(NETWORKS).index(row["network"])))


def cells_of(path: Path, network: str, column: str) -> Cells:
    """A column of the rows of a network, folded by `folded`."""
    rows = [row for row in tables.read_rows(path, FREQUENCY) if row.get("network", network) == network]
    return folded({key: mean for key, (mean, _, _) in tables.mean_and_spread(rows, FREQUENCY, column).items()})


def folded(values: Mapping[tuple[int, int], float]) -> Cells:
    """The mean over the transposes and mirror images of each cell, by 0 ≤ k_1 ≤ k_2."""
    groups: dict[tuple[int, int], list[float]] = {}
    for key, value in values.items():
        groups.setdefault(tuple(sorted(map(abs, key))), []).append(value)
    return {key: float(np.mean(group)) for key, group in groups.items()}


def unfolded(values: Mapping[tuple[int, int], float]) -> Cells:
    """The value of each cell for all of its transposes and mirror images."""
    both = {key: value for (y, x), value in values.items() for key in ((y, x), (x, y))}
    return {canonical_frequency(y, sign * x): value for (y, x), value in both.items() for sign in (1, -1)}


def summary(sensitivity: Cells, accuracies: Cells) -> dict[str, str | int]:
    """How well the sensitivities rank the cells of one network; "" where there is nothing to rank."""
    values, accuracy = np.array([(sensitivity[key], accuracies[key]) for key in accuracies]).T
    above, found = accuracy > UNLEARNT, ranking(values, accuracy)
    row = {"cells": len(accuracy), "learnt": int((accuracy > LEARNT).sum()), "unlearnt": int((~above).sum())}
    row |= {"lowest": f"{accuracy.min():.1f}", "highest": f"{accuracy.max():.1f}"}
    rule, highest = -np.hypot(*np.array(list(accuracies)).T), ranking(values[above], accuracy[above])
    numbers = {"auc": found["auc"], "auc_low_frequency": ranking(rule, accuracy)["auc"]}
    numbers |= {"spearman_above_chance": highest["spearman"]}
    numbers |= {name: found[name] for name in ("largest_unlearnt", "smallest_learnt")}
    return row | {name: f"{value:.3f}" if math.isfinite(value) else "" for name, value in numbers.items()}


def report(folder: Path) -> None:
    """Write the table, print it, and draw the maps and the accuracies over the sensitivities."""
    table, maps, panels = [], {}, {}
    for name in NETWORKS:
        trained = RESULTS / "directional_bias" / "LeNet-fourier" if name == "LeNet" else folder
        accuracies = cells_of(trained / runs.ROWS, name, "test_accuracy")
        if not accuracies:
            continue
        sensitivity = cells_of(folder / "predictions.csv", name, "sensitivity")
        row = {"network": name} | summary(sensitivity, accuracies)
        print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""))
        table.append(row)
        if name in WHOLE_MAP:
            maps[name] = (unfolded(sensitivity), unfolded(accuracies), {})
        pairs = np.array([(sensitivity[key], accuracies[key]) for key in accuracies])
        panels[f"{name}\nAUC {row['auc'] or '–'}"] = pairs.T
    tables.write_rows(folder / "summary.csv", table)
    plotting.save_figure(plotting.prediction_figure(maps, 32), folder / "maps.png")
    labels = {"xlabel": "relative sensitivity", "ylabel": "test accuracy (%)", "xscale": "log", "ylim": (45, 102)}
    plotting.save_figure(plotting.scatters_figure(panels, **labels), folder / "accuracies.png")
    print(f"tables and figures: {folder}")


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Predict if that is missing, train if asked, report."""
    parser = cli.ArgumentParser(__doc__)
    trainable = [name for name in NETWORKS if name != "LeNet"]  # its map is in results/
    parser.add_argument("--train", choices=["all", *trainable], help="train this one")
    parser.add_argument("--output", type=cli.path, default=RESULTS / "studies" / "designs", help="folder")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "predictions.csv").exists():
        predict(args.output / "predictions.csv")
    for name in trainable:
        if args.train in (name, "all"):
            train(name, args.output / "accuracies.csv")
    report(args.output)


if __name__ == "__main__":
    main()
