"""A test that the prediction can fail: LeNet changed in one thing, nine times, and two networks of torchvision.

    python NADs_scripts/designs.py              # predicts, if results/designs/predictions.csv is not there
    python NADs_scripts/designs.py --train all  # trains, then holds the predictions against the accuracies

The predictions were committed before the first training. The nine are trained on the whole map, which is 45 cells:
mirror images and transposes are one experiment for them (three were trained on both transposes). The two of
torchvision are trained on ten cells that span their shares; all in bf16, a variant of the recipe.
Two more predictors stand beside the share, in the hope of one that can be compared between architectures.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import optimize, stats
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import directional_bias
from directional_bias import DATA, LEARNT, ROOT, SIGMA, UNLEARNT, auc, share, variance_along
from models import build_model
from utils import cli, plotting, runs, seeding
from utils.directions import canonical_frequency, fourier_map
from utils.last_layer import draw_network, last_linear, network_rows, weight_rms

KEYS = ("frequency_y", "frequency_x")
RUNS = Path("runs/designs")
PREDICTORS = ("share", "calibrated_share", "signal")


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


DESIGNS = [average_pool, strided, blur_pool, no_pooling, one_pool_of_4, patches, skip, batch_norm, gelu]
WHOLE = {"LeNet": "lenet"} | {design.__name__: f"NADs_scripts.designs:{design.__name__}" for design in DESIGNS}
TEN_CELLS = {name: f"torchvision:{name}" for name in ("regnet_x_400mf", "googlenet")}


def quarter_map() -> dict[tuple[int, int], torch.Tensor]:
    """Fourier images of the map, one for each pair (k_y, ±k_x) of mirror images: 81 of 32×32 pixels."""
    half = range(0, 17, 2)
    return fourier_map(frequencies=[(y, x) for y in half for x in half])


def predictors(arch: str, directions: torch.Tensor, *, num_networks: int = 8) -> dict[str, np.ndarray]:
    """What may tell how well a direction is learnt, (n,) each, from untrained networks.

    The share, as `--predict` has it; the same share for networks whose batch norms hold the statistics of the noise, as
    they do in training; and of these the signal against the noise of the output, n·ε²·Σ(Δ·v)² / Σ Var h(x),
    x ~ N(0, σ²I), with n training samples.
    """
    sigma, flat = SIGMA["fourier"], directions.flatten(1)
    along, total, variance = np.zeros((num_networks, len(flat))), np.zeros(num_networks), 0.0
    for number in range(num_networks):
        generator = seeding.generator("cpu", 0, "noise of prediction", number)
        noise = sigma * torch.randn((512, *directions.shape[1:]), generator=generator)
        network = draw_network(lambda: build_model(arch, 1, 1), "cpu", 0, "network", number)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over what it has seen: one batch
        with torch.no_grad():
            network.train()(noise)
        scale = weight_rms(last_linear(network.eval(), noise[0]))
        rows = network_rows(network, noise[0])  # σ_w·Δ; from here on the network has no last layer
        along[number] = (rows @ flat.T).double().square().sum(0)
        total[number] = rows.double().square().sum()
        variance += scale**2 * network(noise).double().var(0).sum().item()
    signal = DATA["num_train"] * DATA["epsilon"] ** 2 * along.sum(0) / variance
    plain = share(*variance_along(directions, arch=arch, num_networks=num_networks), flat.shape[1])
    return dict(zip(PREDICTORS, (plain, share(along, total, flat.shape[1]), signal), strict=True))


def predict(path: Path) -> None:
    """Write one row for each network and cell; the cells to train on are marked."""
    images, rows = quarter_map(), []
    directions = torch.stack(list(images.values()))
    for name, arch in (WHOLE | TEN_CELLS).items():
        found = predictors(arch, directions)
        order = np.argsort(found["share"])
        spread = set(order[np.linspace(0, len(order) - 1, 10).round().astype(int)]) if name in TEN_CELLS else order
        for number, key in enumerate(images):
            values = {predictor: f"{found[predictor][number]:.5g}" for predictor in PREDICTORS}
            cell = dict(zip(KEYS, key, strict=True)) | {"train": int(number in spread)}
            rows.append({"network": name} | cell | values)
        print(f"{name}: shares {found['share'].min():.3g} to {found['share'].max():.3g}", flush=True)
    runs.write_rows(path, rows)


def train(rows: list[dict[str, str]], folder: Path, only: str) -> None:
    """Train on the marked cells of one network, or of all, by experiment 1."""
    for name, arch in (WHOLE | TEN_CELLS).items():
        if name != "LeNet" and only in (name, "all"):
            marked = [key_of(row) for row in rows if row["network"] == name and row["train"] == "1"]
            cells = [(y, x) for y, x in marked if name in TEN_CELLS or abs(y) <= abs(x)]
            frequencies = [str(text) for cell in cells for text in ("--frequency", *cell)]
            options = ["--arch", arch, "--precision", "bf16", "--output", str(folder / name)]
            directional_bias.main([*options, *frequencies])


def collect(rows: list[dict[str, str]], folder: Path, output: Path) -> dict[str, dict[tuple[int, int], float]]:
    """Test accuracy (%) by network and cell: what is new in `folder` goes to accuracies.csv, where the rest is.

    LeNet's are those of results/, in fp32; there each cell is the mean of two mirror images.
    """
    path, kept = output / "accuracies.csv", {}
    for row in runs.read_rows(path, KEYS):
        kept.setdefault(row["network"], []).append(row)
    for name in WHOLE | TEN_CELLS:
        new = runs.read_rows(folder / name / runs.ROWS, KEYS)
        if len(new) > len(kept.get(name, [])):
            kept[name] = [{"network": name} | row for row in new]
    if kept:
        runs.write_rows(path, [row for name in WHOLE | TEN_CELLS for row in kept.get(name, [])])
    lenet = runs.mean_and_spread(runs.read_rows(ROOT / "results" / "directional_bias_lenet.csv", KEYS), KEYS)
    accuracies = {name: {key_of(row): float(row["test_accuracy"]) for row in found} for name, found in kept.items()}
    cells = [key_of(row) for row in rows if row["network"] == "LeNet"]
    mirrored = {(y, x): canonical_frequency(y, -x) for y, x in cells}
    return {"LeNet": {key: (lenet[key][0] + lenet[mirrored[key]][0]) / 2 for key in cells}} | accuracies


def key_of(row: dict[str, str]) -> tuple[int, int]:
    """The frequency of a row."""
    return int(row["frequency_y"]), int(row["frequency_x"])


def passes(values: np.ndarray, accuracies: np.ndarray) -> float:
    """The value from which accuracy, rising with it (isotonic regression), is above LEARNT; nan if it never passes."""
    order = np.argsort(values)
    above = optimize.isotonic_regression(accuracies[order]).x > LEARNT
    return float(values[order][above.argmax()]) if above.any() and not above.all() else math.nan


def summary(rows: list[dict[str, str]], accuracies: dict[tuple[int, int], float]) -> dict[str, str | int]:
    """How well each predictor ranks the cells of one network; without learnt or unlearnt cells there is no rank."""
    rows = [row for row in rows if math.isfinite(accuracies.get(key_of(row), math.nan))]
    accuracy = np.array([accuracies[key_of(row)] for row in rows])
    learnt, unlearnt = accuracy > LEARNT, accuracy <= UNLEARNT
    counts = {"cells": len(rows), "learnt": int(learnt.sum()), "unlearnt": int(unlearnt.sum())}
    counts |= {"lowest": f"{accuracy.min():.1f}", "highest": f"{accuracy.max():.1f}"}
    scores = {name: np.array([float(row[name]) for row in rows]) for name in PREDICTORS}
    scores["low_frequency"] = np.array([-math.hypot(*key_of(row)) for row in rows])
    ranked = learnt.any() and unlearnt.any()
    aucs = {f"auc_{name}": auc(values[learnt], values[unlearnt]) for name, values in scores.items() if ranked}
    above = accuracy > UNLEARNT
    spearman = stats.spearmanr(scores["share"][above], accuracy[above])[0] if above.sum() > 2 else math.nan
    numbers = {f"auc_{name}": math.nan for name in scores} | aucs | {"spearman_above_chance": spearman}
    numbers |= {f"{name}_passing": passes(scores[name], accuracy) for name in PREDICTORS}
    return counts | {name: f"{value:.3g}" if math.isfinite(value) else "" for name, value in numbers.items()}


def report(rows: list[dict[str, str]], accuracies: dict[str, dict[tuple[int, int], float]], output: Path) -> None:
    """Write the table, print it, and draw the maps and the accuracies over the shares."""
    of = {name: [row for row in rows if row["network"] == name] for name in WHOLE | TEN_CELLS}
    shares = {name: {key_of(row): float(row["share"]) for row in found} for name, found in of.items()}
    table = [{"network": name} | summary(of[name], accuracies[name]) for name in of if name in accuracies]
    runs.write_rows(output / "summary.csv", table)
    for row in table:
        print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""))
    ranked = [float(row["auc_share"]) for row in table if row["auc_share"] and row["network"] in WHOLE]
    print(f"AUC of the share over {len(ranked)} networks: median {np.median(ranked):.3f}, from {min(ranked):.3f}")
    columns = {name: (mirror(shares[name]), mirror(accuracies.get(name, {})), {}) for name in WHOLE}
    plotting.save_figure(plotting.prediction_figure(columns, 32), output / "maps.png")
    panels = {}
    for row in table:
        name = row["network"]
        pairs = [(shares[name][key], accuracy) for key, accuracy in accuracies[name].items()]
        panels[f"{name}\nAUC {row['auc_share'] or '–'}"] = np.array(pairs).T
    labels = {"xlabel": "predicted share", "ylabel": "test accuracy (%)", "xscale": "log", "ylim": (45, 102)}
    plotting.save_figure(plotting.scatters_figure(panels, **labels), output / "accuracies.png")
    print(f"tables and figures: {output}")


def mirror(values: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """The same with each cell's mirror image and, where they have no value of their own, its transposes."""
    transposed = {(x, y): value for (y, x), value in values.items() if (x, y) not in values}
    both = (transposed | values).items()
    return {canonical_frequency(y, sign * x): value for (y, x), value in both for sign in (1, -1)}


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Predict if that has not been done, train if asked, report."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--train", choices=["all", *WHOLE, *TEN_CELLS], help="train these networks")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "designs", help="folder")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "predictions.csv").exists():
        predict(args.output / "predictions.csv")
    rows = runs.read_rows(args.output / "predictions.csv", KEYS)
    if args.train:
        train(rows, RUNS, args.train)
    report(rows, collect(rows, RUNS, args.output), args.output)


if __name__ == "__main__":
    main()
