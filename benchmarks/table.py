"""How fast is this code on this machine? Each experiment, the plain way and ours (measuring.py), measured in one run.

    python -m benchmarks.table --arch lenet resnet18

The plain way runs before and after, as the speed of a shared machine varies; on a GPU its convolutions are in TF32, as
torch has it. A training is that of one direction, a map that of all, both without tests. "To equal error" compares a
network with as many plain gradients as err no more: in the covariance's Frobenius norm, or after whitening it.
"""

from argparse import Namespace
from functools import partial

import torch

from benchmarks.measuring import in_processes, networks, plain_gradient, plain_train, predicted_map, train
from directional_bias import DATA, RECIPE
from models import build_model, paper_name
from utils import cli, runs, workers

STEPS = {"lenet": 400, "vgg11": 8}  # of a training that is timed on a CPU; 4 of the others, 400 on a GPU
CPU, GPU = ["fp32", "bf16"], ["tf32", "tf32, no graphs", "bf16", "bf16, no graphs", "fp32"]  # kinds of trainings
PIXELS = {"densenet121": 128}  # of a plain gradient; all 1,024 would take some 50 GB


def print_row(arch: str, number: int, what: str, plain: float, ours: float) -> None:
    """Print a row as soon as it is there: seconds, and their ratio."""
    print(f"| {paper_name(arch)} | {number} | {what} | {plain:,.6g} | {ours:,.3g} | {plain / ours:,.1f} |", flush=True)


def measure(arch: str, args: Namespace) -> None:
    """Measure an architecture, several processes at once where the scripts would start them."""
    number = args.processes or workers.default_number(workers.is_small(build_model(arch, 1, 1), args.device), 130)
    alone, together, row = partial(in_processes, 1, 0), partial(in_processes, number, args.warm_up), (arch, number)
    images = 128 * (args.steps or (400 if args.device.type == "cuda" else STEPS.get(arch, 4)))
    how, kinds = (arch, args.device, images), GPU if args.device.type == "cuda" else CPU
    plain, *ours = alone(plain_train, *how)[0], *(together(train, *how, kind)[0] for kind in kinds)
    scale = RECIPE["epochs"] * DATA["num_train"] / images
    plain = scale * (plain + alone(plain_train, *how)[0]) / 2
    for kind, seconds in zip(kinds, ours, strict=True):
        print_row(*row, f"a training, {kind}", plain, scale * seconds)
    print_row(arch, 1, "a map: by training, and predicted", 130 * plain, *alone(predicted_map, arch, args.device))
    pixels = PIXELS.get(arch, 1024)
    plain = alone(plain_gradient, arch, args.device, pixels)[0]
    ours, *worth = together(networks, arch, args.device, args.networks)
    plain = (plain + alone(plain_gradient, arch, args.device, pixels)[0]) / 2 * 1024 / pixels
    print_row(*row, "NADs: a gradient, and a network", plain, ours / args.networks)
    for value, norm in zip(worth, ("Frobenius", "whitened"), strict=True):
        print_row(*row, f"NADs, to equal error ({norm}): {value:.0f} gradients", value * plain, ours / args.networks)


def main(argv: list[str] | None = None) -> None:
    """Print what is measured, and the table."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", nargs="+", default=["lenet", "resnet18"], help="those with arrays in NADs/")
    parser.add_argument("--steps", type=cli.positive_int, help="training steps (default: by network and device)")
    parser.add_argument("--networks", type=cli.positive_int, default=4, help="for NADs; two or more")
    parser.add_argument("--processes", type=cli.positive_int, help="at once (default: as many as the scripts start)")
    parser.add_argument("--warm-up", type=cli.positive, default=30.0, help="seconds until several processes begin")
    parser.add_argument("--device", type=cli.device, help="cpu or cuda (default: a GPU if there is one)")
    cli.finish(parser, args := parser.parse_args(argv))
    print(f"{runs.device_name(args.device)}, {workers.num_cores()} cores, torch {torch.__version__}\n")
    print("| network | processes | what | plain, s | ours, s | gained |\n|---|---|---|---|---|---|")
    for arch in args.arch:
        measure(arch, args)


if __name__ == "__main__":
    main()
