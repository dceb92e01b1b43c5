"""Tables of this machine: how fast each experiment runs, here and the plain way of `plain.py`, measured in one run.

    python benchmarks/table.py --arch lenet resnet18

The plain way runs before and after, as the speed of a shared machine varies. The plain training is fp32, on a GPU with
convolutions that torch rounds to TF32. bf16 is timed where the processor has it; on a CPU for the large networks also
with torch's own convolutions (utils/convolution.py), on a GPU also without graphs (`as_graphs` in utils/training.py). A
map by training is extrapolated from the rate in fp32, without its tests. A marginal network is worth so many sampled
ones in the Frobenius norm of the covariance's error, and after whitening, where all directions count the same; times
the ratio in seconds, that is the ratio in time to equal fidelity.
"""

import sys
from pathlib import Path
from statistics import harmonic_mean, mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring
from benchmarks.measuring import how_many_at_once, in_processes, variance_reduction
from directional_bias import DATA, RECIPE
from models import paper_name
from nad_computation import ROOT
from utils import cli, distributed, runs
from utils.nads import AUTHORS_SCALE, load_array, load_nads

TABLES = {
    "training": "network | precision | plain, images/s | here, images/s | a direction: plain | here | ratio",
    "nads": "network | plain, a gradient | here, a network | ratio | is worth | equal fidelity: ratio",
    "map": "network | by training, plain | by training, here | predicted from one network | ratio to plain | to here",
}
STEPS = {"lenet": 400, "vgg11": 8}  # of a training that is timed on a CPU; 4 of the others, 400 on a GPU
NETWORKS = {"lenet": 40}  # whose NADs are timed; 4 of the others
SAMPLES = RECIPE["epochs"] * DATA["num_train"]  # images that the training on a direction sees


def measure_training(arch: str, steps: int, device: torch.device, at_once: int) -> dict[str, tuple[float, float]]:
    """Images a second of all processes, and peak memory of one: the plain way, and ours by precision."""
    found, kinds = {}, {"fp32": ("fp32",)}
    if device.type == "cuda":
        kinds |= {"tf32": ("tf32",), "bf16": ("bf16",), "bf16, without graphs": ("bf16", False)}
    elif torch.cpu.get_capabilities().get("avx512_bf16"):
        kinds["bf16"] = ("bf16",)
        if arch != "lenet":
            kinds["bf16, torch's convolutions"] = ("bf16", False)
    plain = in_processes(1, measuring.training, arch, steps, device, None)
    for kind, options in kinds.items():
        rates, memory = zip(*in_processes(at_once, measuring.training, arch, steps, device, *options), strict=True)
        found[kind] = (sum(rates), max(memory))
    plain += in_processes(1, measuring.training, arch, steps, device, None)
    return {"plain": (harmonic_mean(rate for rate, _ in plain), plain[0][1])} | found


def training_rows(arch: str, found: dict[str, tuple[float, float]], at_once: int) -> list[str]:
    """Images a second, and seconds a direction of experiment 1."""
    plain, plain_memory = found["plain"]
    return [
        f"{paper_name(arch)} | {precision} | {plain:,.0f}, {plain_memory:.1f} GB | {here:,.0f}, {at_once} × "
        f"{memory:.1f} GB | {SAMPLES / plain:,.1f} s | {SAMPLES / here:,.1f} s | {here / plain:.1f}"
        for precision, (here, memory) in found.items()
        if precision != "plain"
    ]


def nads_row(arch: str, networks: int, device: torch.device, at_once: int) -> str:
    """Seconds a network, its worth in sampled ones, and the ratio in time to equal fidelity."""
    name = ROOT / "NADs" / paper_name(arch)
    plain = in_processes(1, measuring.plain_gradient, arch, device)
    found = in_processes(at_once, measuring.marginal_networks, arch, device, networks)
    plain += in_processes(1, measuring.plain_gradient, arch, device)
    before, here = mean(seconds for seconds, _ in plain), mean(seconds for seconds, _, _ in found) / at_once
    rows, nads = found[0][2], load_nads(f"{name}_NADs.npy", 1024).double().numpy()
    scale = load_array(f"{name}_eigenvals.npy") / AUTHORS_SCALE**0.5  # standard deviations along the NADs
    frobenius = variance_reduction(rows)
    whitened = variance_reduction([g @ nads.T / scale for g in rows], squared_norm=len(scale))
    part = f" of {measuring.PLAIN_PIXELS[arch]} pixels" if arch in measuring.PLAIN_PIXELS else ""
    ratio, memory = before / here, max(memory for _, memory, _ in found)
    return (
        f"{paper_name(arch)} | {before:.3g} s, {plain[0][1]:.1f} GB{part} | {here:.3g} s, {at_once} × {memory:.1f} GB"
        f" | {ratio:.1f} | {frobenius:.0f} (whitened {whitened:.0f}) | {ratio * frobenius:.0f} ({ratio * whitened:.0f})"
    )


def map_row(arch: str, found: dict[str, tuple[float, float]], device: torch.device) -> str:
    """Seconds of a predicted map, against hours of the same by training in fp32."""
    ((predicted, directions),) = in_processes(1, measuring.predicted_map, arch, device)
    plain, here = (directions * SAMPLES / found[way][0] for way in ("plain", "fp32"))
    hours = f"{plain / 3600:.3g} h | {here / 3600:.3g} h"
    return f"{paper_name(arch)} | {hours} | {predicted:.2g} s | {plain / predicted:,.0f} | {here / predicted:,.0f}"


def main(argv: list[str] | None = None) -> None:
    """Measure, and print each row as soon as it is there."""
    parser = cli.ArgumentParser(__doc__)
    known = ("lenet", "vgg11", "resnet18", "densenet121")
    parser.add_argument("--arch", nargs="+", choices=known, default=["lenet", "resnet18"])
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES), help="which tables")
    parser.add_argument("--steps", type=cli.positive_int, help="of training (default: by network and device)")
    parser.add_argument("--networks", type=cli.positive_int, help="for NADs, 2 or more (default: 40 LeNets, 4 others)")
    ranks = "that share the device, as ranks of torchrun do (default: as many as the scripts start)"
    parser.add_argument("--processes", type=cli.positive_int, metavar="N", help=ranks)
    cli.add_device_argument(parser)
    args = parser.parse_args(argv)
    if args.networks == 1:
        parser.error("--networks 1 has no pair of networks to compare: draw two or more")
    device, trainings = args.device, {}
    print(f"{runs.device_name(device)}, {distributed.num_cores()} cores, torch {torch.__version__}")
    for table in args.table:
        print(f"\n| {TABLES[table]} |\n|{'---|' * len(TABLES[table].split('|'))}")
        for arch in args.arch:
            at_once = args.processes or how_many_at_once(arch, device)
            if table == "nads":
                rows = [nads_row(arch, args.networks or NETWORKS.get(arch, 4), device, at_once)]
            else:
                steps = args.steps or (400 if device.type == "cuda" else STEPS.get(arch, 4))
                found = trainings[arch] = trainings.get(arch) or measure_training(arch, steps, device, at_once)
                rows = training_rows(arch, found, at_once) if table == "training" else [map_row(arch, found, device)]
            print(*(f"| {row} |" for row in rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
