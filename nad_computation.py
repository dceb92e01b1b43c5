"""Experiment 2: the neural anisotropy directions (NADs) of an architecture, from random networks.

Draw networks f_θ from the architecture's own initialisation, in evaluation mode. Estimate the gradient of each at one
fixed point x by central differences with step s = 100 along each pixel. The eigenvectors of the covariance of these
gradients over θ are the NADs, most important first.

    python nad_computation.py --arch lenet

Two estimators of the same covariance:
  sampled   the paper's protocol: a network of one output gives one gradient g.
  marginal  all these networks end in a linear layer, f = w·h + b. Its weights are independent of the trunk h, have mean
            zero and variance σ_w², so E[g gᵀ | trunk] = σ_w² Δ Δᵀ with Δ the differences of the features: the last
            layer is integrated out exactly, and a trunk is worth many sampled networks (Rao-Blackwell).

Expect for LeNet a first singular value of 0.19 and a last one of 0.0024 (published: 0.189, 0.0023). Two halves of 4,000
networks agree to 0.97 on the first 100 directions.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from models import build_model, canonical_name, paper_name
from utils import cli, distributed, plotting, runs, seeding
from utils.covariance import NADs, nads_from_covariance
from utils.differences import autograd_jacobian, central_differences, local_pays
from utils.drawn import Drawn, nothing_drawn, read_parts, save_part, sum_of_all
from utils.last_layer import check_zero_mean, split_last_linear, weight_statistics, weight_variance
from utils.operations import forward_flops, print_estimate
from utils.training import precision_mode

ROOT = Path(__file__).resolve().parent
NUM_NETWORKS = {"sampled": 10_000, "marginal": 1_000}
CHECKPOINT_SECONDS = 50
CHUNK_BYTES = 2**25
OPTIONS = ("arch", "estimator", "seed", "step", "jacobian", "precision")  # of `add_network`, from the command line


def draw_network(
    arch: str,
    number: int,
    *,
    seed: int = 0,
    num_channels: int = 1,
    image_size: int = 32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Network `number`: built on its device by its own factory from its own seed; one output, evaluation mode."""
    with seeding.default_generator(device, seed, "network", number), torch.device(device):
        model = build_model(arch, num_channels, 1, image_size)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def draw_point(kind: str, *, seed: int = 0, num_channels: int = 1, image_size: int = 32) -> torch.Tensor:
    """The point x of all networks, (C, S, S): "normal" is N(0, I), "zero" the grey image."""
    shape = (num_channels, image_size, image_size)
    return (
        torch.zeros(shape) if kind == "zero" else torch.randn(shape, generator=seeding.generator("cpu", seed, "point"))
    )


def add_network(
    drawn: Drawn, number: int, point: torch.Tensor, *, arch: str, estimator: str = "marginal", seed: int = 0,
    step: float = 100.0, jacobian: str = "differences", chunk_size: int = 32, local: bool = False,
    precision: str = "fp32",
) -> None:  # fmt: skip
    """Draw one network and add its rows: its gradient (sampled) or the differences of its features (marginal)."""
    num_channels, image_size, _ = point.shape
    network = draw_network(
        arch, number, seed=seed, num_channels=num_channels, image_size=image_size, device=point.device
    )
    with precision_mode(precision, point.device):
        if estimator == "marginal":
            network, layer = split_last_linear(network, point)
            drawn.weights += weight_statistics(layer)
            check_zero_mean(drawn.weights)  # pooled over the networks so far, a sharper test than one network's
        if jacobian == "autograd":
            rows = autograd_jacobian(network, point, chunk_size=chunk_size)
        else:
            rows = central_differences(network, point, step=step, chunk_size=chunk_size, local=local)
    if estimator == "sampled":
        check_one_output(arch, len(rows))
    if not rows.isfinite().all():
        raise ValueError(f"the differences of network {number} of {arch} are not finite (step {step:g})")
    drawn.halves[number % 2].add(rows)
    drawn.numbers.add(number)


def check_one_output(arch: str, num_outputs: int) -> None:
    """Refuse to sample a network of several outputs."""
    if num_outputs != 1:
        raise ValueError(f"{arch} has {num_outputs} outputs: the sampled estimator needs a network of one")


def compute_nads(
    arch: str = "lenet", *, estimator: str = "marginal", num_networks: int | None = None, num_channels: int = 1,
    image_size: int = 32, point: str = "normal", seed: int = 0, device: torch.device | str = "cpu", **options: Any,
) -> tuple[NADs, Drawn]:  # fmt: skip
    """The NADs of an architecture in one call, without a folder: for small numbers of networks.

    Args:
        arch: name for `models.build_model`.
        estimator: "marginal" or "sampled".
        num_networks: how many to draw; 1,000 marginal or 10,000 sampled ones by default.
        num_channels: C of the images.
        image_size: S, height and width of the images.
        point: "normal" or "zero", see `draw_point`.
        seed: of the point and the networks.
        device: where the networks are evaluated.
        options: step, jacobian, chunk_size, local, precision of `add_network`.

    Returns:
        The NADs, with D = C·S·S, and the sums that they come from.
    """
    x = draw_point(point, seed=seed, num_channels=num_channels, image_size=image_size).to(device)
    drawn = nothing_drawn(x.numel(), device)
    network = draw_network(arch, 0, seed=seed, num_channels=num_channels, image_size=image_size, device=device)
    options = how_to_evaluate(network, x) | options
    for number in range(num_networks or NUM_NETWORKS[estimator]):
        add_network(drawn, number, x, arch=arch, estimator=estimator, seed=seed, **options)
    return nads_from_covariance(drawn.covariance()), drawn


def look_points(num_networks: int) -> Iterator[int]:
    """The counts at which agreement is looked at: 16, 24, 32, 48, 64, 96, … and the last. The same for any ranks."""
    power = 16
    while power < num_networks:
        yield power
        if power * 3 // 2 < num_networks:
            yield power * 3 // 2
        power *= 2
    yield num_networks


def make_point(args: Namespace) -> torch.Tensor:
    """The point that the command line asks for, (C, S, S)."""
    return draw_point(args.point, seed=args.seed, num_channels=args.num_channels, image_size=args.image_size)


@cli.one_line_errors
def run(args: Namespace, evaluation: dict[str, Any]) -> None:
    """Draw the networks that the run's folder lacks, shared among the ranks; then save and draw the NADs."""
    device = distributed.rank_device(args.device)
    point = make_point(args).to(device)
    options = {key: vars(args)[key] for key in OPTIONS}
    rank, size = distributed.rank(), distributed.world_size()
    with runs.open_run(args.run, settings(args)) as folder:
        with distributed.first_rank_first():
            mine, left_over, done = read_parts(folder, point, args.num_networks)
        own = folder / f"part-{rank}.pt"
        looks = list(look_points(args.num_networks)) if args.until_agreement else [args.num_networks]
        todo = [number for number in range(rank, args.num_networks, size) if number not in done]
        saved = time.monotonic()
        with tqdm(total=len(todo), desc=f"networks of rank 0, {args.arch}", disable=rank > 0) as bar:
            for count in looks:
                while todo and todo[0] < count:
                    add_network(mine, todo.pop(0), point, **evaluation, **options)
                    bar.update()
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        save_part(own, mine)
                        saved = time.monotonic()
                save_part(own, mine)  # before waiting for the other ranks
                drawn = sum_of_all(mine, left_over)
                num_networks = sum(half.num_networks for half in drawn.halves)
                if num_networks > count:
                    continue  # an earlier command went further: look again where it stopped
                agreement = math.nan
                if min(half.num_networks for half in drawn.halves) > 1:
                    found = drawn.agreement(args.agreement_k) if rank == 0 else 0.0
                    agreement = distributed.sum_over_ranks(torch.tensor(found).double()).item()  # rank 0 decides
                bar.set_postfix(networks=num_networks, agreement=f"{agreement:.3f}")
                if args.until_agreement and agreement >= args.until_agreement:
                    break
        if rank == 0:
            report(drawn, num_networks, agreement, args)


@cli.one_line_errors
def estimate(args: Namespace, evaluation: dict[str, Any]) -> None:
    """Print what the run would take, and write nothing: all ranks draw two networks at once, as they would work."""
    device = distributed.rank_device(args.device)
    point = make_point(args).to(device)
    with distributed.first_rank_first():
        runs.check_settings(args.run, settings(args))
        _, _, done = read_parts(args.run, point, args.num_networks)
    seconds = []
    for number in (0, 1):  # the first may be slow
        start = time.perf_counter()
        sums = nothing_drawn(point.numel(), device)
        add_network(sums, number, point, **evaluation, **{key: vars(args)[key] for key in OPTIONS})
        sums.halves[number].rows.cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    network = draw_network(args.arch, 0, num_channels=args.num_channels, image_size=args.image_size)
    weights, *_, fan_ins = sums.weights.tolist()
    num_features = fan_ins / weights if weights else 1
    # Forward passes of the plain way: two a pixel, or one and, for each feature, a backward pass of two.
    passes = 2 * point.numel() if args.jacobian == "differences" else 1 + 2 * num_features
    if distributed.rank() == 0:
        print_estimate(
            f"networks of {paper_name(args.arch)}" + (" at most" if args.until_agreement else ""),
            items=args.num_networks, done=len(done), seconds_an_item=min(seconds),
            flops_an_item=passes * forward_flops(network, tuple(point.shape)),
        )  # fmt: skip


def report(drawn: Drawn, num_networks: int, agreement: float, args: Namespace) -> None:
    """Write the arrays, their description and the figure, and say where they are."""
    covariance = drawn.covariance()
    if not covariance.any():
        raise ValueError(f"the input gradients of all networks of {args.arch} are zero")
    nads = nads_from_covariance(covariance)
    args.output.mkdir(parents=True, exist_ok=True)
    name = args.output / paper_name(args.arch)
    runs.save_array(Path(f"{name}_NADs.npy"), nads.directions)
    runs.save_array(Path(f"{name}_eigenvals.npy"), nads.singular_values.astype(np.float32))
    description = settings(args) | {
        "num_networks": num_networks,
        "agreement": {
            "k": args.agreement_k,
            "split_half_overlap": None if math.isnan(agreement) else round(agreement, 4),
        },
        "weight_variance": weight_variance(drawn.weights) if drawn.weights.any() else None,
        "versions": runs.environment(),
    }
    runs.save_json(Path(f"{name}_NADs.json"), description)
    shown = nads.directions[: args.k].reshape(-1, args.num_channels, args.image_size, args.image_size)
    figure = plotting.nads_figure({paper_name(args.arch): shown}, {paper_name(args.arch): nads.singular_values})
    plotting.save_figure(figure, args.run / "nads.png")
    print(
        f"{num_networks} networks; two halves agree to {agreement:.3f} on the first {args.agreement_k} directions.\n"
        "All networks together are closer to the truth than that: each half has half of them. NADs of nearly equal\n"
        "variance rotate freely within the subspace that they span; compare subspaces, not single rows.\n"
        f"arrays: {name}_NADs.npy, {name}_eigenvals.npy\nfigure: {args.run / 'nads.png'}"
    )


def settings(args: Namespace) -> dict[str, Any]:
    """What a network's rows depend on. How many are wanted may change from one command to the next."""
    keys = ("arch", "estimator", "num_channels", "image_size", "point", "seed", "step", "jacobian", "precision")
    return {key: vars(args)[key] for key in keys} | {"arch": canonical_name(args.arch), "device": args.device.type}


def how_to_evaluate(network: nn.Module, point: torch.Tensor) -> dict[str, Any]:
    """The chunk_size and local of `central_differences` for a network, by it and its device.

    On a CPU, a chunk's largest activation takes at most 32 MB (measured: the caches like no more), and only what a
    pixel changes is evaluated, where that gives the same and saves work. On a GPU, a chunk takes a quarter of the free
    memory.
    """
    if point.device.type == "cpu":
        chunk_size = CHUNK_BYTES // largest_activation(network, point)
        return {"chunk_size": max(2, min(2 * point.numel(), chunk_size)), "local": local_pays(network, point)}
    images = torch.zeros(16, *point.shape, device=point.device)
    before = torch.cuda.memory_allocated(point.device)
    torch.cuda.reset_peak_memory_stats(point.device)
    with torch.no_grad():
        network(images)
    bytes_an_image = max(1, torch.cuda.max_memory_allocated(point.device) - before) // len(images) + 1
    free, _ = torch.cuda.mem_get_info(point.device)
    return {"chunk_size": max(2, min(2 * point.numel(), free // 4 // bytes_an_image)), "local": False}


@torch.no_grad()
def largest_activation(network: nn.Module, point: torch.Tensor) -> int:
    """Bytes of the largest tensor that a layer of the network returns for one image."""
    sizes = [point.nbytes]
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: sizes.append(getattr(output, "nbytes", 0)))
        for module in network.modules()
    ]
    network(point[None].clone())  # its first layer may work in place
    for hook in hooks:
        hook.remove()
    return max(sizes)


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The command line, with the defaults that depend on other arguments filled in."""
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser, num_channels=1)
    group = parser.add_argument_group("estimator")
    group.add_argument("--estimator", choices=NUM_NETWORKS, default="marginal", help="sampled is the paper's protocol")
    group.add_argument("--num-networks", type=cli.positive_int, help="(default: 1,000 marginal or 10,000 sampled)")
    group.add_argument("--until-agreement", type=cli.fraction, metavar="A", help="stop when the halves agree so well")
    group.add_argument("--agreement-k", type=cli.positive_int, help="on so many directions (default: 100)")
    group.add_argument(
        "--jacobian", choices=("differences", "autograd"), default="differences", help="autograd: a variant"
    )
    group.add_argument("--step", type=cli.positive, default=100.0, help="s of the central differences")
    group.add_argument("--point", choices=("normal", "zero"), default="normal", help="x, the same for all networks")
    group.add_argument("--chunk-size", type=cli.positive_int, help="images evaluated at once (default: as fit)")
    group.add_argument("--k", type=cli.positive_int, help="NADs drawn in the figure (default: 8)")
    cli.add_run_arguments(parser, output_help="folder for the arrays (default: that of the checkpoints)")
    # not --run, which torchrun takes for an abbreviation of one of its own
    parser.add_argument(
        "--checkpoints", dest="run", metavar="FOLDER", type=Path,
        help="folder for the checkpoints and the figure (default: --output, or runs/nads/ARCH-ESTIMATOR)",
    )  # fmt: skip
    args = parser.parse_args(argv)

    dimension = args.num_channels * args.image_size**2
    for key, default in (("k", 8), ("agreement_k", 100)):
        if vars(args)[key] is None:
            setattr(args, key, min(default, dimension))
        elif vars(args)[key] > dimension:
            parser.error(f"--{key.replace('_', '-')} {vars(args)[key]} exceeds the input dimension {dimension}")
    args.num_networks = args.num_networks or NUM_NETWORKS[args.estimator]
    if args.estimator == "sampled" and args.num_networks < 2:
        parser.error(f"--num-networks {args.num_networks} has no covariance: sample two networks or more")
    args.run = args.run or args.output or Path("runs/nads") / f"{paper_name(args.arch)}-{args.estimator}"
    args.output = args.output or args.run
    return args


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Check the arguments and one network, then draw them all."""
    args = parse_arguments(argv)
    cli.check_precision(args)
    device = distributed.rank_device(args.device)
    point = make_point(args).to(device)
    shape = {"num_channels": args.num_channels, "image_size": args.image_size}
    network = draw_network(args.arch, 0, seed=args.seed, **shape, device=device)
    flops = forward_flops(network, tuple(point.shape))
    with torch.no_grad():
        output = network(point[None].clone())
    if not isinstance(output, torch.Tensor) or not output.isfinite().all():
        raise ValueError(f"the output of {args.arch} is not a finite tensor at initialisation")
    evaluation = how_to_evaluate(network, point)
    if args.chunk_size:
        evaluation["chunk_size"] = args.chunk_size
    if args.estimator == "marginal":
        split_last_linear(network, point)
    else:
        check_one_output(args.arch, output.numel())
    work = estimate if args.dry_run else run
    distributed.launch(work, args, evaluation, device=args.device, model_flops=flops)


def regenerate(arch: str, *options: str) -> None:
    """Compute an architecture's arrays in NADs/ with these options, then those of the command line.

    The checkpoints go to runs/ beside it.
    """
    checkpoints = ROOT / "runs" / "nads" / paper_name(arch)
    places = ["--output", str(ROOT / "NADs"), "--checkpoints", str(checkpoints)]
    main(["--arch", arch, *places, *options, *sys.argv[1:]])


if __name__ == "__main__":
    main()
