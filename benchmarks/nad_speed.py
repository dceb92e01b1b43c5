"""Speed of the NAD computation against the plain protocol, and what a marginal network is worth, in one run.

    python benchmarks/nad_speed.py --arch resnet18 --networks 4

The plain protocol: a fresh module a network, its 2 x 1,024 shifted images in two batches, autograd's graph left on; it
gives one gradient. Here: only what a pixel changes, in chunks that stay in the cache, channels_last, no graph, and
the last layer integrated out.

The variance-reduction factor E|g g' - C|^2 / E|C_n - C|^2 says how many sampled gradients g estimate the covariance C
as well as one network's marginal C_n does; in the Frobenius norm, and after whitening by C, where all directions count
the same. Its product with the ratio in seconds is the ratio in time to equal fidelity.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import in_a_process, in_processes, peak_memory
from benchmarks.plain import gradient_plainly
from models import build_model, paper_name
from nad_computation import ROOT, draw_network, draw_point, how_to_evaluate, split_last_linear
from utils import cli, distributed
from utils.differences import central_differences
from utils.directions import load_array, load_nads
from utils.operations import forward_flops

SEED = 1  # not that of the shipped arrays: C and the networks here are independent
PLAIN_PIXELS = {"densenet121": 128}  # all 1,024 with their graph take some 50 GB
DRAWS = 200  # last layers drawn for each trunk, to average over g


def plain_network(arch: str, device: torch.device) -> tuple[float, float]:
    """Seconds and peak memory (GB) of one network the plain way; of some of its pixels where all do not fit."""
    point = draw_point("normal", seed=SEED).to(device)
    pixels = PLAIN_PIXELS.get(arch, point.numel())
    gradient_plainly(build_model(arch, 1, 1).eval().to(device), point, pixels=1)  # the first time is slow
    start = time.perf_counter()
    model = build_model(arch, 1, 1).eval().to(device)
    built = time.perf_counter() - start
    gradient_plainly(model, point, pixels=pixels).cpu()
    return built + (time.perf_counter() - start - built) * point.numel() / pixels, peak_memory(device)


def marginal_networks(
    arch: str, device: torch.device, networks: int, threads: int
) -> tuple[float, float, list[np.ndarray]]:
    """Seconds a network and peak memory here, and the differences (F, D) of each, scaled by the weights' std."""
    torch.set_num_threads(threads)
    distributed.keep_freed_memory()
    point = draw_point("normal", seed=SEED).to(device)
    evaluation = how_to_evaluate(draw_network(arch, 0, seed=SEED, device=device), point)
    rows, seconds = [], []
    for number in range(networks):
        start = time.perf_counter()
        trunk, layer = split_last_linear(draw_network(arch, number, seed=SEED, device=device), point)
        delta = central_differences(trunk, point, **evaluation).cpu()
        seconds.append(time.perf_counter() - start)
        rows.append(delta.double().numpy() / (3 * layer.in_features) ** 0.5)
    return float(np.median(seconds)), peak_memory(device), rows


def operations_done(arch: str) -> int:
    """Operations of a network as it is evaluated here on a CPU."""
    point = draw_point("normal", seed=SEED)
    network = draw_network(arch, 0, seed=SEED)
    evaluation = how_to_evaluate(network, point)
    with FlopCounterMode(display=False) as counter:
        central_differences(network, point, **evaluation)
    return counter.get_total_flops()


def measure(arch: str, *, networks: int, device: torch.device) -> dict[str, Any]:
    """Seconds a network and peak memory (GB, a process) of both ways, and the differences of the networks here.

    The plain way runs before and after: the speed of a machine that is shared varies.
    """
    small = forward_flops(build_model(arch, 1, 1), (1, 32, 32)) < distributed.SMALL_MODEL_FLOPS
    at_once = distributed.num_cores() if small and device.type == "cpu" else 1  # as nad_computation.py does
    threads = 1 if at_once > 1 else distributed.num_cores()
    before, plain_memory = in_a_process(plain_network, arch, device)
    ranks = in_processes(at_once, marginal_networks, arch, device, networks, threads)
    after, _ = in_a_process(plain_network, arch, device)
    return {
        "plain": (before + after) / 2, "here": np.mean([rank[0] for rank in ranks]) / at_once, "at_once": at_once,
        "plain_memory": plain_memory, "memory": max(rank[1] for rank in ranks), "rows": ranks[0][2],
    }  # fmt: skip


def variance_reduction(rows: list[np.ndarray], squared_norm: float | None = None) -> float:
    """E|g g' - C|^2 / E|C_n - C|^2 for C_n = G'G with the rows G (F, D) of each network, g = G'u, u uniform.

    Args:
        rows: of networks drawn independently.
        squared_norm: |C|^2 if it is known; else estimated from pairs of networks.
    """
    rng = np.random.default_rng(0)
    own = np.mean([np.square(g @ g.T).sum() for g in rows])  # E|C_n|^2
    if squared_norm is None:
        pairs = [np.square(a @ b.T).sum() for i, a in enumerate(rows) for b in rows[:i]]
        squared_norm = float(np.mean(pairs))  # |C|^2 = E tr C_n C_m
    fourth = []  # E|g|^4 = E|g g'|^2; u uniform of variance 1
    for g in rows:
        u = rng.uniform(-(3**0.5), 3**0.5, (DRAWS, len(g)))
        fourth.append(np.mean(np.square(u @ g).sum(1) ** 2))
    return float((np.mean(fourth) - squared_norm) / (own - squared_norm))


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", default="resnet18", help=cli.ARCH_HELP)
    parser.add_argument("--networks", type=cli.positive_int, default=4, help="marginal networks to draw, at least 2")
    parser.add_argument("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    found = measure(args.arch, networks=args.networks, device=args.device)
    rows = found["rows"]
    name = ROOT / "NADs" / paper_name(args.arch)
    nads = load_nads(f"{name}_NADs.npy", 1024).double().numpy()
    scale = load_array(f"{name}_eigenvals.npy") / 9999**0.5  # standard deviations along the NADs
    frobenius = variance_reduction(rows)
    whitened = variance_reduction([g @ nads.T / scale for g in rows], squared_norm=1024.0)
    ratio = found["plain"] / found["here"]
    cores = distributed.num_cores()
    print(f"{args.arch}, {args.device}, {cores} cores, torch {torch.__version__}, {args.networks} networks")
    print(f"plain: {found['plain']:7.3f} s a network, peak {found['plain_memory']:.1f} GB")
    print(f"here:  {found['here']:7.3f} s a network, peak {found['memory']:.1f} GB, {found['at_once']} at once")
    print(f"ratio in seconds a network: {ratio:.1f}")
    print(f"a marginal network is worth {frobenius:.0f} sampled ones (Frobenius), {whitened:.0f} (whitened)")
    print(f"ratio in time to equal fidelity: {ratio * frobenius:.0f} (Frobenius), {ratio * whitened:.0f} (whitened)")


if __name__ == "__main__":
    main()
