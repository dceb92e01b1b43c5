"""What the scripts' command lines share: argument groups, types that name a bad value, and one-line errors."""

import argparse
import contextlib
import functools
import math
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from refusals import Refusal
from utils import precision, startup

MUST_BE_POSITIVE = ("max_lr", "clip_norm")  # of a recipe; zero switches the others off
ARCH_HELP = "logreg, lenet, vgg11, resnet18, densenet121, torchvision:NAME, timm:NAME, or module:function (yours)"
RECIPE_HELP = {
    "epochs": "passes over the training set",
    "batch_size": "images per step",
    "max_lr": "peak learning rate; it falls linearly to 0",
    "momentum": "momentum of SGD",
    "weight_decay": "weight decay (L2)",
    "clip_norm": "norm of the gradient above which it is scaled down",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with defaults shown in the help, and errors in one line without the usage."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Name the program and what is wrong with its arguments, and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def one_line_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Exit with code 2 and one line on bad input, a file that cannot be used, or too little memory.

    Any other exception is a fault of ours or of the user's network, and keeps its traceback.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if signal.getsignal(signal.SIGINT) is startup.stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return function(*args, **kwargs)
        except (Refusal, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\nstopped: the same command continues", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper


def _number(convert: Callable[[str], Any], accept: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError, OverflowError):
            value = convert(text)
            if math.isfinite(value) and accept(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return parse


positive_int = _number(int, lambda value: value > 0, "a positive whole number")
natural = _number(int, lambda value: value >= 0, "a whole number from 0")
positive = _number(float, lambda value: value > 0, "a positive number")
non_negative = _number(float, lambda value: value >= 0, "a number from 0")


def index_list(text: str) -> list[int]:
    """Indices as "0,5,10" or like a Python slice, "0:1000:50"."""
    try:
        if ":" in text:
            start, stop, step = ([int(part) for part in text.split(":")] + [1])[:3]
            indices = list(range(start, stop, step))
        else:
            indices = [int(part) for part in text.split(",")]
    except ValueError:
        indices = []
    if not indices or min(indices) < 0 or text.count(":") > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of indices from 0, like 0,5,10 or 0:1000:50")
    return list(dict.fromkeys(indices))


def path(text: str) -> Path:
    """A file or a folder; "~" is the home directory, also in --output=~/runs, which no shell expands."""
    return Path(text).expanduser()


def device(text: str) -> torch.device:
    """A device that this machine has."""
    try:
        value = torch.device(text)
    except RuntimeError:
        value = None
    if value is None or value.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: expected cpu, cuda or cuda:N")
    if value.type == "cuda" and (value.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine: it has {torch.cuda.device_count()} GPUs")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--arch, --num-channels, --image-size."""
    group = parser.add_argument_group("network")
    group.add_argument("--arch", default="lenet", help=ARCH_HELP)
    group.add_argument("--num-channels", type=positive_int, default=1, help="colour channels of the images")
    group.add_argument("--image-size", type=positive_int, default=32, help="height and width of the images, in pixels")


def add_recipe_arguments(parser: argparse.ArgumentParser, recipe: Mapping[str, float]) -> None:
    """One option for each setting of a script's RECIPE, its default the one there; and --precision."""
    group = parser.add_argument_group("training")
    for name, value in recipe.items():
        number = positive_int if isinstance(value, int) else positive if name in MUST_BE_POSITIVE else non_negative
        group.add_argument(f"--{name.replace('_', '-')}", type=number, default=value, help=RECIPE_HELP[name])
    text = "arithmetic of the training: fp32 is strict, bf16 faster (default: tf32 on a GPU that has it, else fp32)"
    group.add_argument("--precision", choices=precision.PRECISIONS, help=text)


def add_run_arguments(parser: argparse.ArgumentParser, *, output_help: str, workers: bool = False) -> None:
    """--seed, --device, --output, and --workers for a run that several processes can share."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=natural, default=0, help="random seed")
    group.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.add_argument("--output", type=path, help=output_help)
    if workers:
        text = "processes that share the work (default: one per core for a small network on a CPU, else 1)"
        group.add_argument("--workers", type=positive_int, help=text)


def finish(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Choose the device and the precision that were left open; refuse tf32 without a GPU."""
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "precision" in args:
        args.precision = args.precision or precision.default(args.device)
        if args.precision == "tf32" and args.device.type != "cuda":
            parser.error(f"--precision tf32 needs a CUDA device, not {args.device}")


def refuse_strays(parser: ArgumentParser, args: argparse.Namespace, chosen: str, belongs: Mapping[str, str]) -> None:
    """Refuse options that do nothing: each `belongs` to values of the option `chosen`, and has no default."""
    for option, values in belongs.items():
        if vars(args)[option] is not None and vars(args)[chosen] not in values.split():
            expected = f"--{chosen} {values.replace(' ', ' or ')}, not {vars(args)[chosen]}"
            parser.error(f"--{option.replace('_', '-')} belongs to {expected}")
