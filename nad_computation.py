"""Experiment 2: the neural anisotropy directions (NADs) of an architecture, from random networks (paper, section 3).

Draw networks f_θ from the architecture's own initialisation, in evaluation mode. Estimate the gradient of each at one
fixed point x by central differences with step s = 100 along each pixel. The eigenvectors of the covariance of these
gradients over θ are the NADs, most important first.

    python nad_computation.py --arch lenet

Two estimators of the same covariance:
  marginal  averages over the last layer's weights in closed form; the network must end in a linear layer. One network
            is worth 40 to 200 of the sampled estimator (utils/last_layer.py says why).
  sampled   the paper's protocol: one gradient from each network, which has one output.

Expect for LeNet a first singular value of 0.19 and a last one of 0.0024 (published: 0.189, 0.0023). The first 100 NADs
of one half of the 1,000 networks overlap with those of the other half by 0.92 (1: they span the same space).
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import utils.startup  # noqa: F401

# isort: split

import numpy as np
import torch
from tqdm import tqdm

from models import build_model, checked, identity, paper_name
from refusals import Refusal
from utils import cli, files, plotting, runs, seeding, workers
from utils.last_layer import draw_network, estimator_for, network_rows
from utils.nads import GradientSums, NADs, central_differences, nads_of_covariance, nads_of_gradients, read_sums

ROOT = Path(__file__).resolve().parent
# The paper draws 10,000 networks; with the last layer integrated out, 1,000 give more.
NUM_NETWORKS = {"sampled": 10_000, "marginal": 1_000}
STEP = 100.0  # s; another step finds other directions, see results/nads/step.csv
AGREEMENT_K = 100  # directions on which the agreement of two halves is reported


def draw_point(num_channels: int = 1, image_size: int = 32, *, seed: int = 0) -> torch.Tensor:
    """The point x ~ N(0, I) of all networks, (C, S, S)."""
    return torch.randn(num_channels, image_size, image_size, generator=seeding.generator("cpu", seed, "point"))


def draw(arch: str | Callable, number: int, point: torch.Tensor, seed: int = 0) -> torch.nn.Module:
    """Network f_θ number `number` of an architecture, for images like the point (C, S, S)."""
    num_channels, image_size, _ = point.shape
    build = partial(build_model, arch, num_channels, 1, image_size)
    return draw_network(build, point.device, seed, "network", number)


def sampled_nads(arch: str | Callable, point: torch.Tensor, *, num_networks: int, step: float = STEP) -> NADs:
    """The paper's protocol: the principal components of the gradients of `num_networks` networks at the point."""
    gradients = []
    for number in range(num_networks):
        network = draw(arch, number, point)
        gradients.append(central_differences(network, point, step=step)[0])  # g, (D,)
    return nads_of_gradients(torch.stack(gradients))


def compute_nads(
    arch: str | Callable = "lenet",
    *,
    estimator: str = "marginal",
    num_networks: int | None = None,
    num_channels: int = 1,
    image_size: int = 32,
    step: float = STEP,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[NADs, GradientSums]:
    """The NADs of an architecture for images (C, S, S), D = C·S·S, and the sums over networks that they come from.

    Raises:
        Refusal: the estimator does not fit the network, or no gradient is other than zero.
    """
    point = draw_point(num_channels, image_size, seed=seed).to(device)
    sums = GradientSums(point.numel(), device)
    for number in tqdm(range(num_networks or NUM_NETWORKS[estimator]), desc="networks", delay=1):
        sums.add(number, network_rows(draw(arch, number, point, seed), point, estimator=estimator, step=step))
    return nads_of_sums(sums, estimator), sums


def nads_of_sums(sums: GradientSums, estimator: str) -> NADs:
    """The NADs of all networks in the sums."""
    covariance = sums.covariance(estimator)
    if not covariance.any():
        raise Refusal("the input gradients of all networks are zero: the networks do not see their input")
    return nads_of_covariance(covariance)


# --- A run: each process keeps the sums over its networks in a file of its own


def add_missing_networks(folder: Path, point: torch.Tensor, args: Namespace) -> None:
    """Draw this process's part of the networks that no file in the folder has, and keep their sums in its own file."""
    own, config = folder / f"part-{workers.rank()}-of-{workers.world_size()}.pt", runs.read_config(folder)
    sums = GradientSums(point.numel(), point.device)
    if own.exists():
        sums.add_file(own)
    finished = finished_networks(folder)
    missing = [number for number in workers.own_part(range(args.num_networks)) if number not in finished]
    saved = time.monotonic()
    for number in tqdm(missing, desc=f"{paper_name(args.arch)}, networks", disable=not workers.speaks(), delay=1):
        start = time.monotonic()
        network = draw(args.arch, number, point, args.seed)
        sums.add(number, network_rows(network, point, estimator=args.estimator, step=args.step))
        sums.seconds += time.monotonic() - start
        if number == missing[-1] or time.monotonic() - saved > files.CHECKPOINT_SECONDS:
            runs.refuse_if_changed(folder, config)
            sums.save(own)
            saved = time.monotonic()


def finished_networks(folder: Path) -> set[int]:
    """The numbers of the networks whose sums are in the folder."""
    return {number for path in folder.glob("part-*.pt") for number in files.load_checkpoint(path, "numbers")}


@contextmanager
def progress(folder: Path, args: Namespace) -> Iterator[Callable[[], None]]:
    """A bar over the networks in the folder, whoever drew them, as often as their sums are saved."""
    initial, looked = len(finished_networks(folder)), time.monotonic()
    with tqdm(total=args.num_networks, initial=initial, desc=f"{paper_name(args.arch)}, networks") as bar:

        def refresh() -> None:
            nonlocal looked
            if time.monotonic() < looked + 2:  # to look takes milliseconds for each file
                return
            looked = time.monotonic()
            if (finished := len(finished_networks(folder))) > bar.n:
                bar.update(finished - bar.n)

        yield refresh


def report(nads: NADs, sums: GradientSums, args: Namespace) -> None:
    """Write the arrays, their description and the figure, and say where they are."""
    made = runs.origin(args.device)  # before the arrays in NADs/ differ from those of the commit
    k = min(AGREEMENT_K, len(nads.directions))
    agreement = sums.agreement(args.estimator, k)
    args.output.mkdir(parents=True, exist_ok=True)
    name = paper_name(args.arch)
    arrays, spectrum, description = (args.output / f"{name}_{kind}" for kind in FILES)
    files.save_array(arrays, nads.directions)
    files.save_array(spectrum, nads.singular_values.astype(np.float32))
    facts = {
        "num_networks": len(sums.numbers),
        "agreement": {"k": k, "split_half_overlap": None if math.isnan(agreement) else round(agreement, 4)},
        "scale": "√(9999·λ); σ_w is the rms of the last layer's weights, 1/√(3·fan_in) where they start at zero",
        "seconds": round(sums.seconds, 1),
        "command": runs.command(),
    }
    files.save_json(description, runs.read_config(args.checkpoints) | facts | made)
    shown = nads.directions[:8].reshape(-1, args.num_channels, args.image_size, args.image_size)
    figure = plotting.nads_figure({name: shown}, {name: nads.singular_values})
    plotting.save_figure(figure, args.checkpoints / "nads.png")
    print(
        f"{len(sums.numbers)} networks; two halves agree to {agreement:.3f} on the first {k} directions.\n"
        "NADs of nearly equal variance rotate freely: compare the subspaces that they span, not single rows.\n"
        f"arrays: {arrays}, {spectrum}\nfigure: {args.checkpoints / 'nads.png'}"
    )


# --- The command

FILES = ("NADs.npy", "eigenvals.npy", "NADs.json")  # after the architecture's name


def settings(args: Namespace) -> dict[str, Any]:
    """What a network's rows depend on. How many are wanted may change from one command to the next."""
    model = build_model(args.arch, args.num_channels, 1, args.image_size)
    return runs.settings(args, "num_networks", "checkpoints", arch=identity(args.arch, model))


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    group = parser.add_argument_group("estimator")
    group.add_argument("--estimator", choices=NUM_NETWORKS, default="marginal", help="sampled is the paper's protocol")
    group.add_argument("--num-networks", type=cli.positive_int, help="networks drawn (default: 1,000; sampled: 10,000)")
    group.add_argument("--step", type=cli.positive, default=STEP, help="step s; the NADs depend on it")
    default = "--checkpoints, or runs/nads/ARCH-ESTIMATOR"
    cli.add_run_arguments(parser, output_help=f"folder for the arrays (default: {default})", workers=True)
    parser.add_argument("--checkpoints", type=cli.path, help="folder for checkpoints and figure (default: --output)")
    args = parser.parse_args(argv)
    cli.finish(parser, args)
    args.num_networks = args.num_networks or NUM_NETWORKS[args.estimator]
    if args.estimator == "sampled" and args.num_networks < 2:
        parser.error(f"--num-networks {args.num_networks} has no covariance: sample two networks or more")
    args.checkpoints = args.checkpoints or args.output or Path(f"runs/nads/{paper_name(args.arch)}-{args.estimator}")
    args.output = args.output or args.checkpoints
    return args


def check(args: Namespace, point: torch.Tensor) -> torch.nn.Module:
    """Refuse a network of which the covariance cannot be estimated so. Returns one of its kind."""
    build = partial(build_model, args.arch, args.num_channels, 1, args.image_size)
    model = checked(build, args.arch, point.shape, 1)
    if args.estimator == "marginal" and estimator_for(model.eval(), point) == "sampled":
        raise Refusal(f"{args.arch} does not end in a linear layer of its own: use --estimator sampled")
    return model


def refuse_to_replace(args: Namespace, finished: set[int]) -> None:
    """Refuse to take networks away from sums, or to replace arrays by others or by those of fewer networks."""
    if finished and max(finished) >= args.num_networks:
        number = max(finished)
        raise Refusal(f"{args.checkpoints} has networks up to number {number}: ask for {number + 1} or more")
    described = args.output / f"{paper_name(args.arch)}_{FILES[2]}"
    if described.exists():
        before, now = files.read_json(described, "num_networks"), settings(args)
        if before["num_networks"] > args.num_networks:
            fewer = f"{before['num_networks']} networks, more than {args.num_networks}"
            raise Refusal(f"{described} is of {fewer}: choose another --output")
        if differing := [key for key in now.keys() & before.keys() - {"device"} if before[key] != now[key]]:
            changes = "; ".join(f"{key} was {before[key]!r}, now {now[key]!r}" for key in sorted(differing))
            raise Refusal(f"{described} is of other settings ({changes}): choose another --output")


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check everything, draw the networks that the run's folder lacks, and report."""
    args = parse_arguments(argv)
    point = draw_point(args.num_channels, args.image_size, seed=args.seed)
    small = workers.is_small(check(args, point), args.device)
    finished = finished_networks(args.checkpoints)
    refuse_to_replace(args, finished)
    runs.open_run(args.checkpoints, settings(args), defaults=runs.settings(parse_arguments([])))
    missing = args.num_networks - len(finished)
    memory = 3 * 16 * point.numel() ** 2  # sums, and copies of them
    number = min(args.workers or workers.default_number(small, missing, memory), missing)
    what = f"{paper_name(args.arch)}, networks"
    runs.announce(what, args.num_networks, len(finished), args.device, args.checkpoints, number)
    workers.set_threads(small)
    workers.run_copies(__file__, argv, number, progress(args.checkpoints, args))
    add_missing_networks(args.checkpoints, point.to(workers.own_device(args.device)), args)
    sums = read_sums(args.checkpoints.glob("part-*.pt"), point.numel())
    if len(sums.numbers) == args.num_networks and not workers.is_copy():
        report(nads_of_sums(sums, args.estimator), sums, args)
    elif workers.speaks():
        print(f"{len(sums.numbers)} of {args.num_networks} networks are finished; the same command continues")


def regenerate(arch: str, *options: str) -> None:
    """Compute an architecture's arrays in NADs/ with these options, then those of the command line.

    The checkpoints go to runs/ beside it.
    """
    places = ["--output", str(ROOT / "NADs"), "--checkpoints", str(ROOT / "runs" / "nads" / paper_name(arch))]
    main(["--arch", arch, *places, *options, *sys.argv[1:]])


if __name__ == "__main__":
    main()
