"""How far untrained networks predict the maps, and how much chance there is in it: results/prediction/.

    python NADs_scripts/prediction.py

The paper's five architectures, and LeNet and ResNet-18 without pooling. maps.png has the predicted maps above those by
training in results/, with --published above the published ones too; stability.csv tells how AUC and shares move with
the seed and the number of networks. The work is kept in runs/prediction, and continued.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from directional_bias import KEYS, ROOT, SETS_IN, STEP, auc, limits, share, variance_along
from models import paper_name
from utils import cli, files, plotting, runs, tables
from utils.directions import canonical_frequency, fourier_map

STUDIED = [  # architecture, with pooling, seeds, networks for each
    *((arch, True, (0, 1, 2), 8) for arch in ("logreg", "lenet", "vgg11", "resnet18")),
    ("densenet121", True, (0, 1), 8),
    ("lenet", False, (0, 1, 2), 8),
    ("resnet18", False, (0,), 1),  # minutes
]
FREQUENCY = KEYS["fourier"]


def kept(folder: Path, arch: str, pooling: bool, seed: int, num_networks: int, directions: torch.Tensor) -> np.ndarray:
    """Variance along each direction and random ones, one row per network (N, n + 1), from the file that keeps it."""
    path = folder / f"{arch}{'' if pooling else '-nopooling'}-{seed}-step{STEP:g}.npy"
    if not path.exists():
        options = {"arch": arch, "pooling": pooling, "num_networks": num_networks, "seed": seed}
        files.save_array(path, np.column_stack(variance_along(directions, **options)))
    return np.load(path, allow_pickle=False)


def measured_map(arch: str, pooling: bool) -> dict[tuple[int, ...], float]:
    """The accuracies in results/, fp32 or bf16, by canonical frequency; none where none was measured."""
    folder, variant = ROOT / "results" / "directional_bias", "" if pooling else "-nopooling"
    paths = [folder / f"{paper_name(arch)}{precision}{variant}-fourier" / runs.ROWS for precision in ("", "-bf16")]
    rows = [row for file in paths for row in tables.read_rows(file, FREQUENCY)]
    return tables.means(rows, FREQUENCY)


def ranking(shares: dict, accuracies: list, which: str) -> dict[str, str]:
    """AUC of the shares, the largest of an unlearnt and the smallest of a learnt cell; each "" where there is none."""
    x, y = np.array([(shares[key], value) for key, value in accuracies if key in shares]).reshape(-1, 2).T
    found = zip(("auc", "unlearnt_up_to", "learnt_from"), (auc(x, y), *limits(x, y)), strict=True)
    return {f"{name}_{which}": f"{value:.3f}" if np.isfinite(value) else "" for name, value in found}


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Predict, compare, write the tables and the figure."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--published", type=Path, help="CSV with the published accuracies, drawn in a third row")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "prediction", help="folder")
    args = parser.parse_args(argv)
    images, folder = fourier_map(), ROOT / "runs" / "prediction"
    for path in (folder, args.output):
        path.mkdir(parents=True, exist_ok=True)
    directions = torch.stack(list(images.values()))
    maps, stability, columns = [], [], {}
    for arch, pooling, seeds, num_networks in STUDIED:
        found = np.stack([kept(folder, arch, pooling, seed, num_networks, directions) for seed in seeds])
        best = share(*np.split(found.reshape(-1, len(images) + 1), [-1], 1))
        accuracies, published = measured_map(arch, pooling), []
        if args.published and pooling and any(arch in row for row in tables.published_rows(args.published)):
            rows = tables.read_published(args.published, FREQUENCY, arch)
            published = [(canonical_frequency(*index), accuracy) for index, accuracy in rows]  # k and −k both
        name = paper_name(arch) + ("" if pooling else " without pooling")
        columns[name] = (dict(zip(images, best.tolist(), strict=True)), accuracies, dict(published))
        for key, value in zip(images, best, strict=True):
            maps.append({"network": name} | dict(zip(FREQUENCY, key, strict=True)) | {"share": f"{value:.5g}"})
        for number in (n for n in (1, 2, 4, 8) if n <= num_networks):
            for seed, networks in zip(seeds, found, strict=True):
                values = share(*np.split(networks[:number], [-1], 1))
                shares = dict(zip(images, values.tolist(), strict=True))
                row = {"network": name, "networks": number, "seed": seed}
                row |= {"smallest": f"{values.min():.3g}", "largest": f"{values.max():.3g}"}
                row |= {"below_a_half": int((values < SETS_IN).sum())}
                row |= ranking(shares, list(accuracies.items()), "measured") | ranking(shares, published, "published")
                row |= {"median_factor_to_all": f"{np.exp(np.median(np.abs(np.log(values / best)))):.3f}"}
                print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""))
                stability.append(row)
    tables.write_rows(args.output / "maps.csv", maps)
    tables.write_rows(args.output / "stability.csv", stability)
    figure = plotting.prediction_figure(columns, 32)
    file = args.output / ("maps_published.png" if args.published else "maps.png")
    plotting.save_figure(figure, file)
    print(f"figure: {file}\ntables: {args.output / 'maps.csv'}, {args.output / 'stability.csv'}")


if __name__ == "__main__":
    main()
