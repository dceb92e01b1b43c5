"""A table of this machine: for each experiment and architecture, how fast it runs, and how fast it could.

    python benchmarks/table.py

Operations are counted from the model (two a multiply-add; training takes three forward passes). The ceiling is what the
machine reaches on a large matrix product or a large convolution, whichever is faster, in fp32. Both ways of a row are
measured in one run, each in processes of its own. Twenty minutes on 2 cores, most of it the plain way; `--arch` and
`--experiment` make it shorter.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import nad_speed, training_speed
from benchmarks.measuring import ceilings, in_a_process
from models import build_model, paper_name
from utils import cli, distributed
from utils.operations import forward_flops

ARCHITECTURES = ("lenet", "vgg11", "resnet18", "densenet121")
EXPERIMENTS = ("directions", "nads", "cifar")
TRAINED = {"lenet": 20_000, "vgg11": 1_024}  # images that a training row takes on a CPU; 512 of the others


def row(experiment: str, arch: str, device: torch.device, ceiling: float) -> str:
    """Measure and write one line of the table."""
    channels, outputs = {"directions": (1, 2), "nads": (1, 1), "cifar": (3, 10)}[experiment]
    forward = forward_flops(build_model(arch, channels, outputs), (channels, 32, 32))
    if experiment == "nads":
        found = nad_speed.measure(arch, networks=40 if arch == "lenet" else 3, device=device)
        operations = 2 * 32 * 32 * forward
        counted = in_a_process(nad_speed.operations_done, arch) if device.type == "cpu" else operations
        rate, unit = counted / found["here"], f"{found['here']:.3g} s a network"
        plain, ratio = f"{found['plain']:.3g} s", found["plain"] / found["here"]
    else:
        num_images = TRAINED.get(arch, 512) if device.type == "cpu" else 50_000
        found = training_speed.measure(experiment, arch, num_images=num_images, epochs=1, device=device)
        counted = operations = 3 * forward
        rate, unit = counted * found["here"], f"{found['here']:,.0f} images/s"
        plain, ratio = f"{found['plain']:,.0f} images/s", found["here"] / found["plain"]
    pixels = nad_speed.PLAIN_PIXELS.get(arch) if experiment == "nads" else None
    part = f" of {pixels} pixels" if pixels else ""
    per = f"{operations:.2e}" + (f" ({counted / operations:.0%} done)" if counted < operations else "")
    return (
        f"| {experiment} | {paper_name(arch)} | {per} | {plain}, {found['plain_memory']:.1f} GB{part} | {unit}, "
        f"{found['at_once']} × {found['memory']:.1f} GB | {rate / 1e9:,.0f} | {rate / ceiling:.0%} | {ratio:.1f} |"
    )


def main(argv: list[str] | None = None) -> None:
    """Print the table, a line as it is measured."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="rows")
    parser.add_argument("--experiment", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="rows")
    parser.add_argument("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{distributed.num_cores()} cores"
    print(f"{name}, torch {torch.__version__}\n\n| precision | matrix product, GFLOP/s | convolution, GFLOP/s |")
    print("|---|---|---|")
    found = in_a_process(ceilings, args.device)
    for precision, rates in found.items():
        print(f"| {precision} | " + " | ".join(f"{rate / 1e9:,.0f}" for rate in rates) + " |")
    print(
        "\n| experiment | network | operations (image or network) | plain | here | GFLOP/s | of the ceiling | ratio |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for experiment in args.experiment:
        for arch in args.arch:
            print(row(experiment, arch, args.device, max(found["fp32"])), flush=True)


if __name__ == "__main__":
    main()
