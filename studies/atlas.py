"""Predicted maps of the paper's five architectures and of all classification models of torchvision.

    python studies/atlas.py                      # all of them, 20 minutes on 2 cores: results/studies/atlas/
    python studies/atlas.py --arch mynets:small  # which of them are most like mine?

Grey images of 32×32 pixels, or of 64 or 96 where a model takes no smaller ones, at the same frequencies in cycles per
pixel. Expect a map for 83 of 85 architectures.
"""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from scipy.cluster import hierarchy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from directional_bias import SIGMA
from models import ARCHITECTURES, build_model, canonical_name, check_model, paper_name
from predict import NUM_RANDOM, STEP, THRESHOLD, relative_sensitivity, squared_differences
from refusals import Refusal
from studies import RESULTS
from utils import cli, files, plotting, tables
from utils.directions import fourier_map, frequency_grid
from utils.last_layer import estimator_for
from utils.nads import load_array

CACHE = Path("runs/studies/atlas")  # one file per architecture, from which an interrupted atlas continues
IMAGE_SIZES = (32, 64, 96)
NUM_NETWORKS = {"sampled": 100, "small": 8, "large": 2}  # small networks differ more from each other, and cost less
SMALL_MODEL = 5_000_000  # parameters
LEAST = 2.0**-20  # stands in for a sensitivity of zero, which has no logarithm
NUM_BANDS = 8  # of the radius |k|, from 0 to the corner of the map


def architectures() -> dict[str, str]:
    """Family by name for `models.build_model`: the module of torchvision, or "paper"."""
    from torchvision import models  # takes seconds

    names = models.list_models(module=models)
    families = {f"torchvision:{name}": models.get_model_builder(name).__module__.split(".")[-1] for name in names}
    return dict.fromkeys(ARCHITECTURES, "paper") | families


def predicted_map(arch: str, device: torch.device) -> dict:
    """The predicted map of an architecture; or why it has none, for the largest image tried."""
    start, why_not = time.monotonic(), ""
    for size in IMAGE_SIZES:
        try:
            model = build_model(arch, 1, 1, size)
            check_model(model, arch, (1, size, size), 1)
            model.eval()
            images = fourier_map(size)
            directions = torch.stack(list(images.values()))
            estimator = estimator_for(model, directions[0])
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            kind = "sampled" if estimator == "sampled" else "small" if num_parameters < SMALL_MODEL else "large"
            along, random = squared_differences(directions.to(device), arch=arch, num_networks=NUM_NETWORKS[kind])
            halves = [relative_sensitivity(along[part::2], random[part::2]) for part in (0, 1)]
        except (ValueError, RuntimeError) as error:  # too small an image for this network
            why_not = str(error).splitlines()[0]
            continue
        return {
            "parameters": num_parameters,
            "image_size": size,
            "estimator": estimator,
            "networks": len(random),
            "seconds": round(time.monotonic() - start, 1),
            "frequencies": [[frequency * 32 // size for frequency in index] for index in images],
            "sensitivity": np.maximum(relative_sensitivity(along, random), LEAST).tolist(),
            "agreement": float(np.corrcoef(np.log(np.maximum(halves, LEAST)))[0, 1]),
        }
    return {"why_not": why_not}


def log_map(entry: dict) -> np.ndarray:
    """log₂ of the sensitivity on the map of 16×16 frequencies, (16, 16), DC in the middle."""
    values = dict(zip(map(tuple, entry["frequencies"]), entry["sensitivity"], strict=True))
    return np.log2(plotting.map_array(values, 32, frequency_grid(32)))


def row_of(arch: str, family: str, entry: dict) -> dict:
    """An architecture's row of the table, empty but for the reason where there is no map."""
    columns = ("parameters", "image_size", "estimator", "networks", "seconds")
    row = {"architecture": arch, "family": family} | {column: entry.get(column, "") for column in columns}
    logs = log_map(entry) if "sensitivity" in entry else np.full((16, 16), np.nan)
    values, radius = np.exp2(logs), np.hypot(*np.meshgrid(frequency_grid(32), frequency_grid(32)))
    bands = (radius * NUM_BANDS / radius.max()).astype(int).clip(max=NUM_BANDS - 1)
    means = np.array([logs[bands == band].mean() for band in range(NUM_BANDS)])
    numbers = {"smallest": values.min(), "median": np.median(values), "largest": values.max()}
    numbers |= {"below_a_half": np.where(np.isnan(values), np.nan, values < THRESHOLD).mean()}
    numbers |= {"agreement": entry.get("agreement", np.nan), "roughness": np.std(logs - means[bands])}
    numbers |= {f"band_{band}": values[bands == band].mean() for band in range(NUM_BANDS)}
    row |= {name: f"{value:.4g}" if np.isfinite(value) else "" for name, value in numbers.items()}
    return row | {"why_not": entry.get("why_not", "")}


def cache_path(arch: str, device: torch.device) -> Path:
    """The file that keeps an architecture's map, named by all that it depends on."""
    settings = {"networks": NUM_NETWORKS, "sizes": IMAGE_SIZES, "small": SMALL_MODEL, "device": device.type}
    settings |= {
        "arch": canonical_name(arch),
        "step": STEP,
        "random": NUM_RANDOM,
        "sigma": SIGMA,
        "torch": torch.__version__,
    }
    return CACHE / f"{paper_name(arch)}-{files.digest(json.dumps(settings).encode())}.json"


def make_atlas(args: Namespace) -> None:
    """Predict the maps that are missing, then write the table and the maps, and draw them."""
    families, entries = architectures(), {}
    CACHE.mkdir(parents=True, exist_ok=True)
    for arch in families:
        path = cache_path(arch, args.device)
        if not path.exists():
            files.save_json(path, predicted_map(arch, args.device))
            print(f"{arch}: done", flush=True)
        entries[arch] = json.loads(path.read_text())
    args.output.mkdir(parents=True, exist_ok=True)
    tables.write_rows(args.output / "atlas.csv", [row_of(arch, families[arch], entries[arch]) for arch in families])
    mapped = [arch for arch in families if "sensitivity" in entries[arch]]
    logs = np.stack([log_map(entries[arch]) for arch in mapped])
    files.save_array(args.output / "maps.npy", np.exp2(logs).astype(np.float32))
    links = hierarchy.linkage(logs.reshape(len(logs), -1), "ward", optimal_ordering=True)
    figure = plotting.sheet_figure(np.exp2(logs), [short_name(arch) for arch in mapped], links)
    plotting.save_figure(figure, args.output / "sheet.png")
    print(f"{len(mapped)} of {len(families)} architectures have a map\ntables and figure: {args.output}")


def print_nearest(args: Namespace) -> None:
    """Name the architectures of the atlas whose maps differ least, by the rms of log₂ of the ratio of sensitivities."""
    names = [row["architecture"] for row in tables.read_rows(args.output / "atlas.csv") if not row.get("why_not")]
    logs, arch = np.log2(load_array(args.output / "maps.npy")), canonical_name(args.arch)
    if logs.shape != (len(names), 16, 16):
        raise Refusal(f"{args.output} has maps of shape {logs.shape} for {len(names)} rows: make the atlas first")
    entry = predicted_map(arch, args.device)
    if "sensitivity" not in entry:
        raise Refusal(f"{arch} has no map: {entry['why_not']}")
    distances = np.sqrt(np.mean((logs - log_map(entry)) ** 2, axis=(1, 2)))
    for index in [index for index in np.argsort(distances) if names[index] != arch][:5]:
        print(f"{names[index]}: its sensitivities differ by a factor of {2 ** distances[index]:.2f} (rms)")


def short_name(arch: str) -> str:
    """The name in figures: the paper's architectures as LeNet, torchvision's as resnet50."""
    return paper_name(arch).removeprefix("torchvision-")


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Make the atlas, or look one architecture up in it."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--output", type=cli.path, default=RESULTS / "studies" / "atlas", help="folder of the atlas")
    parser.add_argument("--arch", help=f"name the five that are most like this one: {cli.ARCH_HELP}")
    parser.add_argument("--device", type=cli.device, default="cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    (print_nearest if args.arch else make_atlas)(args)


if __name__ == "__main__":
    main()
