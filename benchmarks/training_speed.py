"""Training speed of experiments 1 and 3 against the plain way, in one run.

    python benchmarks/training_speed.py directions --arch lenet
    python benchmarks/training_speed.py cifar --arch lenet

The plain way: a DataLoader with 2 workers, one training at a time, `.item()` in every step. Here: what the scripts do,
on random images of the same sizes. On a CPU they train a small network on every core at once, one thread each; both
ways are then counted by trainings finished per second.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import in_a_process, peak_memory
from benchmarks.plain import TextbookLeNet, train_plainly
from models import build_model, canonical_name
from utils import cli, distributed
from utils.operations import forward_flops
from utils.training import make_optimizer, train_epoch

RECIPES = {
    "directions": {"max_lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.5, "batch_size": 128},
    "cifar": {"max_lr": 0.21, "momentum": 0.9, "weight_decay": 5e-4, "clip_norm": 0.5, "batch_size": 128},
}
IMAGES = {"directions": (10_000, 1, 2), "cifar": (50_000, 3, 10)}  # number, channels, classes


def make_work(experiment: str, num_images: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of the experiment's size, and labels."""
    _, channels, classes = IMAGES[experiment]
    images = torch.randn(num_images, channels, 32, 32, device=device)
    return images, torch.randint(classes, (num_images,), device=device)


def train_the_plain_way(
    experiment: str, arch: str, num_images: int, epochs: int, device: torch.device
) -> tuple[float, float]:
    """Images a second and peak memory."""
    model = build_model(arch, *IMAGES[experiment][1:])
    if canonical_name(arch) == "lenet":
        model = TextbookLeNet(*IMAGES[experiment][1:])
    images, labels = make_work(experiment, num_images, torch.device("cpu"))
    train_plainly(model.to(device), images, labels, epochs=1, max_steps=2, **RECIPES[experiment])  # as below
    start = time.perf_counter()
    seen = train_plainly(model, images, labels, epochs=epochs, **RECIPES[experiment])
    return seen / (time.perf_counter() - start), peak_memory(device)


def train_here(experiment: str, arch: str, num_images: int, epochs: int, device: torch.device, folder: Path) -> None:
    """One training on this rank; images a second and peak memory go to a file."""
    model = build_model(arch, *IMAGES[experiment][1:]).to(device, memory_format=torch.channels_last)
    images, labels = make_work(experiment, num_images, device)
    recipe = dict(RECIPES[experiment])
    optimizer = make_optimizer(model, **{key: recipe.pop(key) for key in ("momentum", "weight_decay")}, max_lr=0.1)
    generator = torch.Generator(device).manual_seed(0)
    # The first steps choose algorithms and touch memory for the first time.
    warm = slice(0, 2 * recipe["batch_size"])
    train_epoch(model, optimizer, images[warm], labels[warm], epoch=0, epochs=1, generator=generator, **recipe)
    distributed.barrier()
    start = time.perf_counter()
    for epoch in range(epochs):
        train_epoch(model, optimizer, images, labels, epoch=epoch, epochs=epochs, generator=generator, **recipe)
    found = [epochs * num_images / (time.perf_counter() - start), peak_memory(device)]
    (folder / str(distributed.rank())).write_text(json.dumps(found))


def train_on_all_ranks(experiment: str, arch: str, num_images: int, epochs: int, device: torch.device) -> list:
    """Images a second and peak memory of each rank, as many as the scripts start."""
    flops = forward_flops(build_model(arch, *IMAGES[experiment][1:]), (IMAGES[experiment][1], 32, 32))
    with tempfile.TemporaryDirectory() as folder:
        work = (experiment, arch, num_images, epochs, device, Path(folder))
        distributed.launch(train_here, *work, device=device, model_flops=flops)
        return [json.loads(path.read_text()) for path in Path(folder).iterdir()]


def measure(experiment: str, arch: str, *, num_images: int, epochs: int, device: torch.device) -> dict[str, float]:
    """Images a second and peak memory (GB, a process) of both ways.

    The plain way runs before and after: the speed of a machine that is shared varies.
    """
    work = (experiment, arch, num_images, epochs, device)
    before, memory = in_a_process(train_the_plain_way, *work)
    ranks = in_a_process(train_on_all_ranks, *work)
    after, _ = in_a_process(train_the_plain_way, *work)
    return {
        "plain": 2 / (1 / before + 1 / after), "here": sum(rate for rate, _ in ranks), "at_once": len(ranks),
        "plain_memory": memory, "memory": max(memory for _, memory in ranks),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure both ways and print the ratio."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("experiment", choices=RECIPES)
    parser.add_argument("--arch", default="lenet", help=cli.ARCH_HELP)
    parser.add_argument("--epochs", type=cli.positive_int, default=4, help="passes to time")
    parser.add_argument("--images", type=cli.positive_int, help="number of images (default: the experiment's)")
    parser.add_argument("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    num_images = args.images or IMAGES[args.experiment][0]

    found = measure(args.experiment, args.arch, num_images=num_images, epochs=args.epochs, device=args.device)
    print(f"{args.experiment}, {args.arch}, {args.device}, {distributed.num_cores()} cores, {torch.__version__}")
    print(f"plain: {found['plain']:8.0f} images/s, peak {found['plain_memory']:.1f} GB")
    print(f"here:  {found['here']:8.0f} images/s in {found['at_once']} at once, peak {found['memory']:.1f} GB each")
    print(f"ratio: {found['here'] / found['plain']:8.2f}")
    if args.experiment == "directions":
        seconds = [20 * 10_000 / found[way] for way in ("plain", "here")]
        print(f"seconds a direction (20 epochs of 10,000): plain {seconds[0]:.1f}, here {seconds[1]:.1f}")


if __name__ == "__main__":
    main()
