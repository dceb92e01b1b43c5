"""How much noise may the arithmetic add to the NADs? One network in several precisions against float64.

    python benchmarks/nad_precision.py --arch resnet18

For each precision, the error of the differences along the shipped NADs is compared with the differences themselves:
noise by signal, root mean square, over the first, middle and last directions. A precision is of use where the ratio is
well below 1 in the whole spectrum. tf32 is emulated by rounding the inputs and weights of every convolution and linear
layer to its 10 bits of mantissa, so that it can be judged without a GPU.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import paper_name
from nad_computation import ROOT, draw_network, draw_point, split_last_linear
from utils import cli
from utils.differences import central_differences
from utils.directions import load_nads
from utils.training import precision_mode

BANDS = ((0, 10), (100, 110), (500, 510), (900, 910), (1013, 1023))


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to a mantissa of 10 bits, to nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def emulate_tf32(model: nn.Module) -> nn.Module:
    """Round the weights, and the inputs on their way in, of each convolution and linear layer."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = round_to_tf32(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (round_to_tf32(inputs[0]),))
    return model


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", default="resnet18", help=cli.ARCH_HELP)
    args = parser.parse_args(argv)
    point = draw_point("normal", seed=1)
    nads = load_nads(ROOT / "NADs" / f"{paper_name(args.arch)}_NADs.npy", point.numel()).double()

    def differences(precision: str) -> torch.Tensor:
        trunk, _ = split_last_linear(draw_network(args.arch, 0, seed=1), point)
        if precision == "float64":
            return central_differences(trunk.double(), point.double(), chunk_size=16)
        if precision == "tf32":
            trunk = emulate_tf32(trunk)
        with precision_mode("bf16" if precision == "bf16" else "fp32", "cpu"):
            return central_differences(trunk, point).double()

    exact = differences("float64") @ nads.T  # (F, D), along the NADs
    print(f"{args.arch}: noise by signal along NADs " + ", ".join(f"{a}-{b - 1}" for a, b in BANDS))
    for precision in ("fp32", "tf32", "bf16"):
        noise = differences(precision) @ nads.T - exact
        ratios = [(noise[:, a:b].square().mean() / exact[:, a:b].square().mean()).sqrt().item() for a, b in BANDS]
        print(f"{precision}: " + "  ".join(f"{ratio:.1e}" for ratio in ratios))


if __name__ == "__main__":
    main()
