"""The predicted maps of all classification models of torchvision and of the paper's five: results/atlas/.

    python NADs_scripts/atlas.py                     # or torchrun --nproc-per-node 2 NADs_scripts/atlas.py
    python NADs_scripts/atlas.py --arch mynets:small # which of them are most like mine?

Two untrained networks of each, eight of the small and a hundred of those without a last linear layer; grey images of
32×32 pixels, or of 64 or 96 where a model takes no smaller images, at the same frequencies in cycles per pixel. What is
done of the atlas is kept in runs/atlas, and continued.
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

from directional_bias import ROOT, SETS_IN, STEP, share, variance_along
from models import ARCHITECTURES, build_model, canonical_name, check_model, paper_name
from utils import cli, distributed, files, plotting, runs, tables
from utils.directions import fourier_map, frequency_grid, load_array
from utils.last_layer import estimator_for

IMAGE_SIZES = (32, 64, 96)
CHEAP_MODEL = 5_000_000  # parameters; networks of smaller ones differ more from each other, and cost less
PARTS = (slice(None), slice(0, None, 2), slice(1, None, 2))  # all networks, the even and the odd ones
LEAST = 2.0**-20  # stands in for a share of zero, which has no logarithm
NUM_BANDS = 8  # of the radius |k|, from 0 to the corner of the map
FINDINGS = {
    "depth": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg11_bn", "vgg19_bn"),
    "patches": ("vit_b_16", "vit_b_32", "swin_t", "swin_v2_t", "convnext_tiny", "alexnet"),
}


def architectures() -> dict[str, str]:
    """Family by name for `models.build_model`: the module of torchvision, or "paper"."""
    from torchvision import models  # takes seconds

    names = models.list_models(module=models)
    families = {f"torchvision:{name}": models.get_model_builder(name).__module__.split(".")[-1] for name in names}
    return dict.fromkeys(ARCHITECTURES, "paper") | families


def predict_map(arch: str, device: torch.device) -> dict:
    """What untrained networks tell of an architecture; or why they cannot, for the largest image tried."""
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
            del model
            num_networks = 100 if estimator == "sampled" else 8 if num_parameters < CHEAP_MODEL else 2
            along, random = variance_along(directions.to(device), arch=arch, num_networks=num_networks)
            shares, *halves = (share(along[part], random[part]) for part in PARTS)
        except (ValueError, RuntimeError) as error:
            why_not = str(error)
            continue
        return {
            "parameters": num_parameters,
            "image_size": size,
            "estimator": estimator,
            "networks": len(random),
            "seconds": round(time.monotonic() - start, 1),
            "frequencies": [[frequency * 32 // size for frequency in index] for index in images],
            "shares": np.maximum(shares, LEAST).tolist(),
            "agreement": float(np.corrcoef(np.log(np.maximum(halves, LEAST)))[0, 1]),
        }
    return {"why_not": why_not}


def shares_of(found: dict) -> dict[tuple[int, int], float]:
    """Shares by the frequency in cycles per 32 pixels."""
    return {tuple(index): value for index, value in zip(found["frequencies"], found["shares"], strict=True)}


def log_map(found: dict) -> np.ndarray:
    """log₂ of the share on the map of 16×16 frequencies, (16, 16), DC in the middle."""
    return np.log2(plotting.map_array(shares_of(found), 32, frequency_grid(32)))


def row_of(arch: str, family: str, found: dict) -> dict:
    """An architecture's row of the table, empty but for the reason where there is no map."""
    columns = ("parameters", "image_size", "estimator", "networks", "seconds")
    row = {"architecture": arch, "family": family} | {column: found.get(column, "") for column in columns}
    values = np.exp2(log_map(found)) if "shares" in found else np.full((16, 16), np.nan)
    grid = frequency_grid(32)
    radius = np.hypot(*np.meshgrid(grid, grid))
    bands = (radius * NUM_BANDS / radius.max()).astype(int).clip(max=NUM_BANDS - 1)
    radial = np.array([values[bands == band].mean() for band in range(NUM_BANDS)])
    logs = np.log2(values)
    roughness = np.std(logs - np.array([logs[bands == band].mean() for band in range(NUM_BANDS)])[bands])
    numbers = {"smallest": values.min(), "median": np.median(values), "largest": values.max()}
    numbers |= {"below_a_half": np.where(np.isnan(values), np.nan, values < SETS_IN).mean()}
    numbers |= {"agreement": found.get("agreement", np.nan), "roughness": roughness} | {
        f"band_{band}": value for band, value in enumerate(radial)
    }
    row |= {name: f"{value:.4g}" if np.isfinite(value) else "" for name, value in numbers.items()}
    return row | {"why_not": found.get("why_not", "")}


@cli.one_line_errors
def run(args: Namespace) -> None:
    """Predict the maps that are missing, then write the tables and draw the figures."""
    device, folder, families = distributed.rank_device(args.device), ROOT / "runs" / "atlas", architectures()
    paths = {arch: folder / f"{paper_name(arch)}.json" for arch in families}
    settings = {"image_sizes": IMAGE_SIZES, "cheap_model": CHEAP_MODEL, "step": STEP, "device": device.type}
    with runs.open_run(folder, settings, device):
        missing = [arch for arch, file in paths.items() if not file.exists()]
        distributed.barrier()  # all have read before one writes
        runs.announce("architectures", len(paths), len(paths) - len(missing), device, folder)
        for arch in distributed.own_part(missing):
            found = predict_map(arch, device)
            files.save_json(paths[arch], found)
            print(f"{arch}: {found.get('why_not', 'done')}", flush=True)
        distributed.barrier()
        if distributed.rank() == 0:
            report(families, {arch: json.loads(file.read_text()) for arch, file in paths.items()}, args.output)


@cli.one_line_errors
def compare(args: Namespace) -> None:
    """Name the architectures of the atlas whose maps differ least, by the rms of log₂ of the ratio of shares."""
    folder, arch = args.output, args.arch
    names = [row["architecture"] for row in tables.read_rows(folder / "atlas.csv") if not row.get("why_not")]
    logs = np.log2(load_array(folder / "maps.npy"))
    if logs.shape != (len(names), 16, 16):
        raise ValueError(
            f"{folder} has maps of shape {logs.shape} for {len(names)} rows: make the atlas without --arch"
        )
    found = predict_map(arch, distributed.rank_device(args.device))
    if "shares" not in found:
        raise ValueError(f"{arch} has no map: {found['why_not']}")
    distances = np.sqrt(np.mean((logs - log_map(found)) ** 2, axis=(1, 2)))
    for index in [index for index in np.argsort(distances) if names[index] != arch][:5]:
        print(f"{names[index]}: its shares differ by a factor of {2 ** distances[index]:.2f} (rms)")


def short_name(arch: str) -> str:
    """The name in figures: the paper's architectures as LeNet, torchvision's as resnet50."""
    return paper_name(arch).removeprefix("torchvision-")


def report(families: dict[str, str], found: dict[str, dict], folder: Path) -> None:
    """Write the table and the maps, and draw the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row_of(arch, family, found[arch]) for arch, family in families.items()]
    tables.write_rows(folder / "atlas.csv", rows)
    mapped = [arch for arch in families if "shares" in found[arch]]
    logs = np.stack([log_map(found[arch]) for arch in mapped])
    files.save_array(folder / "maps.npy", np.exp2(logs).astype(np.float32))
    links = hierarchy.linkage(logs.reshape(len(logs), -1), "ward", optimal_ordering=True)
    figure = plotting.sheet_figure(np.exp2(logs), [short_name(arch) for arch in mapped], links)
    plotting.save_figure(figure, folder / "sheet.png")
    for finding, names in FINDINGS.items():
        maps = {name: (shares_of(found[f"torchvision:{name}"]), {}, {}) for name in names}
        figure = plotting.prediction_figure(maps, 32)
        plotting.save_figure(figure, folder / f"{finding}.png")
    print(f"{len(mapped)} of {len(families)} architectures have a map\ntables and figures: {folder}")


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and share the architectures among the ranks."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "atlas", help="folder of the atlas")
    parser.add_argument("--arch", help=f"look at this one only, and name the nearest: {cli.ARCH_HELP}")
    cli.add_device_argument(parser)
    args = parser.parse_args(argv)
    args.arch = args.arch and canonical_name(args.arch)
    distributed.launch(compare if args.arch else run, args, device=args.device, items=1 if args.arch else None)


if __name__ == "__main__":
    main()
