"""Experiment 2: the neural anisotropy directions (NADs) of an architecture, from random networks (paper, section 3).

Draw networks f_θ from the architecture's own initialisation, in evaluation mode. Estimate the gradient of each at one
fixed point x by central differences with step s = 100 along each pixel. The eigenvectors of the covariance of these
gradients over θ are the NADs, most important first.

    python nad_computation.py --arch lenet

Two estimators of the same covariance:
  sampled   the paper's protocol: each network, of one output, gives one gradient g.
  marginal  the last linear layer is integrated out exactly (see utils/last_layer.py): each network then gives one row
            per feature, and is worth many sampled ones (Rao-Blackwell).

Expect for LeNet a first singular value of 0.19 and a last one of 0.0024 (published: 0.189, 0.0023). Two halves of 4,000
networks agree to 0.97 on the first 100 directions.
"""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models import build_model, identity, paper_name
from utils import cli, distributed, files, plotting, runs, seeding
from utils.covariance import GradientSum, NADs, nads_from_covariance
from utils.last_layer import draw_network, estimator_for, network_rows

ROOT = Path(__file__).resolve().parent
# The paper draws 10,000 networks; with the last layer integrated out, 1,000 give more.
NUM_NETWORKS = {"sampled": 10_000, "marginal": 1_000}
STEP = 100.0  # s; another step finds other directions, see results/nads/step.csv
AGREEMENT_K = 100  # directions on which the agreement of two halves is reported


def draw_point(num_channels: int = 1, image_size: int = 32, *, seed: int = 0) -> torch.Tensor:
    """The point x ~ N(0, I) of all networks, (C, S, S)."""
    return torch.randn(num_channels, image_size, image_size, generator=seeding.generator("cpu", seed, "point"))


def compute_nads(
    arch: str = "lenet",
    *,
    estimator: str = "marginal",
    num_networks: int | None = None,
    num_channels: int = 1,
    image_size: int = 32,
    step: float = STEP,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    folder: Path | None = None,
) -> tuple[NADs, GradientSum]:
    """The NADs of an architecture for images (C, S, S), D = C·S·S, and the sums over networks that they come from.

    `folder` keeps the sums, one file for each rank, so that a killed run continues and ranks share the work. ValueError
    if the estimator does not fit the network, or no gradient is other than zero.
    """
    num_networks = num_networks or NUM_NETWORKS[estimator]
    point = draw_point(num_channels, image_size, seed=seed).to(device)
    sums, done = GradientSum(point.numel(), device), set()
    if folder:
        done = read_sums(folder, point.numel()).numbers
        own = folder / f"part-{distributed.rank()}.pt"
        sums.merge(read_sums(folder, point.numel(), own.name))
        distributed.barrier()  # all have read before one writes
        runs.announce(f"{arch}, networks", num_networks, len(done), point.device, folder)
    saved = time.monotonic()
    missing = distributed.own_part([number for number in range(num_networks) if number not in done])
    bar = tqdm(missing, desc=f"{arch}, networks of rank 0", disable=distributed.rank() > 0, delay=1)
    for number in bar:
        build = lambda: build_model(arch, num_channels, 1, image_size)  # noqa: E731
        network = draw_network(build, point.device, seed, "network", number)
        sums.add(number, network_rows(network, point, estimator=estimator, step=step, precision=precision))
        if folder and (number == missing[-1] or time.monotonic() - saved > runs.CHECKPOINT_SECONDS):
            files.save_checkpoint(own, sums.state())
            saved = time.monotonic()
    if folder:
        distributed.barrier()
        sums = read_sums(folder, point.numel())
    covariance = sums.covariance(estimator)
    if not covariance.any():
        raise ValueError(f"the input gradients of all networks of {arch} are zero")
    return nads_from_covariance(covariance), sums


def read_sums(folder: Path, dimension: int, pattern: str = "part-*.pt") -> GradientSum:
    """The sums in a run's folder over the networks of all ranks, or of the one whose file the pattern names."""
    sums = GradientSum(dimension)
    for path in sorted(folder.glob(pattern)):
        sums.merge(GradientSum.from_state(files.load_checkpoint(path), path, dimension))
    return sums


@cli.one_line_errors
def run(args: Namespace) -> None:
    """Draw the networks that the run's folder lacks, shared among the ranks; then save and draw the NADs."""
    device = distributed.rank_device(args.device)
    with runs.open_run(args.checkpoints, settings(args), device):
        options = ("arch", "estimator", "num_networks", "num_channels", "image_size", "step", "seed", "precision")
        options = {key: vars(args)[key] for key in options}
        nads, sums = compute_nads(**options, device=device, folder=args.checkpoints)
        if distributed.rank() == 0:
            report(nads, sums, args)


def report(nads: NADs, sums: GradientSum, args: Namespace) -> None:
    """Write the arrays, their description and the figures, and say where they are."""
    k = min(AGREEMENT_K, len(nads.directions))
    agreement = sums.agreement(args.estimator, k)
    args.output.mkdir(parents=True, exist_ok=True)
    name = paper_name(args.arch)
    written = [args.output / f"{name}_{kind}" for kind in ("NADs.npy", "eigenvals.npy", "NADs.json")]
    files.save_array(written[0], nads.directions)
    files.save_array(written[1], nads.singular_values.astype(np.float32))
    description = files.read_json(args.checkpoints / "config.json", "settings")["settings"] | {
        "num_networks": len(sums.numbers),
        "agreement": {"k": k, "split_half_overlap": None if math.isnan(agreement) else round(agreement, 4)},
        "scale": "√(9999·λ); σ_w is the rms of the last layer's weights, 1/√(3·fan_in) where they start at zero",
        "environment": runs.environment(args.device),
    }
    files.save_json(written[2], description)
    shown = nads.directions[:8].reshape(-1, args.num_channels, args.image_size, args.image_size)
    figure, drawn = plotting.nads_figure({name: shown}, {name: nads.singular_values}), args.checkpoints / "nads.png"
    plotting.save_figure(figure, drawn)
    print(
        f"{len(sums.numbers)} networks; two halves agree to {agreement:.3f} on the first {k} directions.\n"
        "NADs of nearly equal variance rotate freely: compare the subspaces that they span, not single rows.\n"
        f"arrays: {written[0]}, {written[1]}\nfigure: {drawn}"
    )


def settings(args: Namespace) -> dict[str, Any]:
    """What a network's rows depend on. How many are wanted may change from one command to the next."""
    return runs.settings(args, "num_networks", "checkpoints", arch=identity(args.arch))


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    group = parser.add_argument_group("estimator")
    group.add_argument("--estimator", choices=NUM_NETWORKS, default="marginal", help="sampled is the paper's protocol")
    group.add_argument("--num-networks", type=cli.positive_int, help="(default: 1,000 marginal or 10,000 sampled)")
    group.add_argument("--step", type=cli.positive, default=STEP, help="s of the central differences")
    cli.add_run_arguments(parser, output_help="folder for the arrays (default: that of the checkpoints)")
    where = "folder for the checkpoints and the figures (default: --output, or runs/nads/ARCH-ESTIMATOR)"
    parser.add_argument("--checkpoints", type=Path, help=where)
    args = parser.parse_args(argv)
    args.num_networks = args.num_networks or NUM_NETWORKS[args.estimator]
    if args.estimator == "sampled" and args.num_networks < 2:
        parser.error(f"--num-networks {args.num_networks} has no covariance: sample two networks or more")
    args.checkpoints = args.checkpoints or args.output or Path(f"runs/nads/{paper_name(args.arch)}-{args.estimator}")
    args.output = args.output or args.checkpoints
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check the arguments and the network, then draw them all."""
    args = parse_arguments(argv)
    model = build_model(args.arch, args.num_channels, 1, args.image_size)
    blank = torch.zeros(args.num_channels, args.image_size, args.image_size)
    if args.estimator == "marginal" and estimator_for(model.eval(), blank) == "sampled":
        raise ValueError(f"{args.arch} does not end in a linear layer of its own: use --estimator sampled")
    runs.check_settings(args.checkpoints, settings(args))
    done = read_sums(args.checkpoints, blank.numel()).numbers
    if done and max(done) >= args.num_networks:
        raise ValueError(f"{args.checkpoints} has networks up to number {max(done)}: ask for {max(done) + 1} or more")
    described = args.output / f"{paper_name(args.arch)}_NADs.json"
    if described.exists():  # to be replaced by no fewer networks of the same settings, on a device of any kind
        before = files.read_json(described, "num_networks", *settings(args))
        fewer = min(args.num_networks, before["num_networks"])
        now = settings(args) | {"num_networks": fewer, "device": before["device"]}
        runs.refuse_changes(f"{described} is of", before, now, "choose another --output")
    small = distributed.is_small(model, args.device)
    distributed.launch(run, args, device=args.device, small=small, items=args.num_networks)


def regenerate(arch: str, *options: str) -> None:
    """Compute an architecture's arrays in NADs/ with these options, then those of the command line.

    The checkpoints go to runs/ beside it.
    """
    places = ["--output", str(ROOT / "NADs"), "--checkpoints", str(ROOT / "runs" / "nads" / paper_name(arch))]
    main(["--arch", arch, *places, *options, *sys.argv[1:]])


if __name__ == "__main__":
    main()
