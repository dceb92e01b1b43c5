"""How well a few untrained networks rank the trainings in results/, by their number and the seed.

    python studies/stability.py --published fourier_accuracies.csv

The paper's five architectures, and LeNet and ResNet-18 without pooling, in half an hour: results/studies/stability/.
maps.csv and maps.png have the predicted maps by all networks drawn, and stability.csv the AUC and the
sensitivities by 1, 2, 4 and 8 of them. Expect with 4 networks an AUC of 0.988 and more.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from directional_bias import KEYS, Accuracies
from models import paper_name
from predict import THRESHOLD, ranking, relative_sensitivity, squared_differences
from studies import RESULTS
from utils import cli, plotting, runs, tables
from utils.directions import canonical_frequency, fourier_map

FREQUENCY = KEYS["fourier"]
NETWORKS = [  # architecture, with pooling, seeds, networks for each seed
    *((arch, True, (0, 1, 2), 8) for arch in ("logreg", "lenet", "vgg11", "resnet18")),
    ("densenet121", True, (0, 1), 8),
    ("lenet", False, (0, 1, 2), 8),
    ("resnet18", False, (0,), 1),  # minutes
]


def accuracies_of(arch: str, pooling: bool, published: Path | None) -> dict[str, Accuracies]:
    """The measured accuracies in results/, fp32 or bf16, and the published ones (with pooling; of k and −k both)."""
    folder, variant = RESULTS / "directional_bias", "" if pooling else "-nopooling"
    paths = [folder / f"{paper_name(arch)}{precision}{variant}-fourier" / runs.ROWS for precision in ("", "-bf16")]
    measured = tables.means([row for path in paths for row in tables.read_rows(path, FREQUENCY)], FREQUENCY)
    known = published and pooling and any(arch in row for row in tables.published_rows(published))
    theirs = tables.read_published(published, FREQUENCY, arch) if known else []
    return {"measured": list(measured.items()), "published": [(canonical_frequency(*k), y) for k, y in theirs]}


def row_of(values: np.ndarray, best: np.ndarray, keys: list, accuracies: dict[str, Accuracies]) -> dict[str, str]:
    """How far sensitivities reach, rank accuracies, and differ from the best estimate; "" where nothing is to rank."""
    row = {"smallest": f"{values.min():.3g}", "largest": f"{values.max():.3g}"}
    row |= {"below_a_half": int((values < THRESHOLD).sum())}
    sensitivity = dict(zip(keys, values, strict=True))
    for which, pairs in accuracies.items():
        x, y = np.array([(sensitivity[key], value) for key, value in pairs if key in sensitivity]).reshape(-1, 2).T
        found = {name: value for name, value in ranking(x, y).items() if name != "spearman"}
        row |= {f"{name}_{which}": f"{value:.3f}" if np.isfinite(value) else "" for name, value in found.items()}
    return row | {"median_factor_to_all": f"{np.exp(np.median(np.abs(np.log(values / best)))):.3f}"}


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Predict, compare, write the tables and the figure."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--published", type=cli.path, help="CSV with the published accuracies")
    parser.add_argument("--output", type=cli.path, default=RESULTS / "studies" / "stability", help="folder")
    parser.add_argument("--device", type=cli.device, default="cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    images, maps, stability, columns = fourier_map(), [], [], {}
    directions = torch.stack(list(images.values())).to(args.device)
    for arch, pooling, seeds, num_networks in NETWORKS:
        name = paper_name(arch) + ("" if pooling else " without pooling")
        options = {"arch": arch, "pooling": pooling, "num_networks": num_networks}
        by_seed = {seed: squared_differences(directions, seed=seed, **options) for seed in seeds}
        best = relative_sensitivity(*map(np.concatenate, zip(*by_seed.values(), strict=True)))
        accuracies = accuracies_of(arch, pooling, args.published)
        columns[name] = (dict(zip(images, best.tolist(), strict=True)), dict(accuracies["measured"]), {})
        for key, value in zip(images, best, strict=True):
            maps.append({"network": name} | dict(zip(FREQUENCY, key, strict=True)) | {"sensitivity": f"{value:.5g}"})
        for number in (number for number in (1, 2, 4, 8) if number <= num_networks):
            for seed, (along, random) in by_seed.items():
                values = relative_sensitivity(along[:number], random[:number])
                row = row_of(values, best, list(images), accuracies)
                stability.append({"network": name, "networks": number, "seed": seed} | row)
        print(f"{name}: done", flush=True)
    tables.write_rows(args.output / "maps.csv", maps)
    tables.write_rows(args.output / "stability.csv", stability)
    plotting.save_figure(plotting.prediction_figure(columns, 32), args.output / "maps.png")
    print(f"tables and figure: {args.output}")


if __name__ == "__main__":
    main()
