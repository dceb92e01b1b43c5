"""Training speed of experiments 1 and 3 against the plain way, in one run.

    python benchmarks/training_speed.py directions --arch lenet
    python benchmarks/training_speed.py cifar --arch lenet

The plain way: a DataLoader with 2 workers, one training at a time, `.item()` in every step. Here: what the scripts do,
on random images of the same sizes. On a CPU they train a small network on every core at once, one thread each; both
ways are then counted by trainings finished per second.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def make_work(experiment: str, arch: str, num_images: int, device: torch.device):
    """A fresh network and random images of the experiment's size."""
    _, channels, classes = IMAGES[experiment]
    model = build_model(arch, channels, classes).to(device)
    images = torch.randn(num_images, channels, 32, 32, device=device)
    return model, images, torch.randint(classes, (num_images,), device=device)


def train_here(experiment: str, arch: str, num_images: int, epochs: int, device: torch.device, folder: Path) -> None:
    """One training on this rank; images per second go to a file."""
    model, images, labels = make_work(experiment, arch, num_images, device)
    model.to(memory_format=torch.channels_last)
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
    seconds = time.perf_counter() - start
    (folder / str(distributed.rank())).write_text(str(epochs * num_images / seconds))


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

    model, images, labels = make_work(args.experiment, args.arch, num_images, args.device)
    flops = forward_flops(model, tuple(images.shape[1:]))
    if canonical_name(args.arch) == "lenet":
        model = TextbookLeNet(*IMAGES[args.experiment][1:]).to(args.device)
    start = time.perf_counter()
    seen = train_plainly(model, images.cpu(), labels.cpu(), epochs=args.epochs, **RECIPES[args.experiment])
    plain = seen / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        work = (args.experiment, args.arch, num_images, args.epochs, args.device, Path(folder))
        distributed.launch(train_here, *work, device=args.device, model_flops=flops)
        rates = [float(path.read_text()) for path in Path(folder).iterdir()]
    print(f"{args.experiment}, {args.arch}, {args.device}, {distributed.num_cores()} cores, {torch.__version__}")
    print(f"plain: {plain:8.0f} images/s")
    print(f"here:  {sum(rates):8.0f} images/s in {len(rates)} trainings at once")
    print(f"ratio: {sum(rates) / plain:8.2f}")
    if args.experiment == "directions":
        each = 20 * 10_000
        print(f"seconds a direction (20 epochs of 10,000): plain {each / plain:.1f}, here {each / sum(rates):.1f}")


if __name__ == "__main__":
    main()
