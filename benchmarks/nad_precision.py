"""How much noise may the arithmetic add to the NADs? One network in several precisions against float64.

    python benchmarks/nad_precision.py --arch resnet18

Noise divided by signal, root mean square, of the differences along the shipped NADs: a precision is of use where it is
well below 1 in the whole spectrum. tf32 and bf16 are emulated, to be judged without a GPU: the inputs and weights of
every convolution and linear layer are rounded to 10 or 7 bits of mantissa, for bf16 the outputs too.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import build_model, paper_name
from nad_computation import ROOT, STEP, draw_point
from utils import cli
from utils.last_layer import draw_network, last_linear, without
from utils.nads import central_differences, load_nads

DROPPED_BITS = {"tf32": 13, "bf16": 16}  # of float32's 23
BANDS = ((0, 10), (100, 110), (500, 510), (900, 910), (1013, 1023))


def drop_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round float32 to nearest, without the last `bits` of its 23 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)).view(torch.float32)


def differences(arch: str, point: torch.Tensor, precision: str) -> torch.Tensor:
    """Those of one network's features along each pixel, (F, D), float64."""
    network = draw_network(lambda: build_model(arch, 1, 1), "cpu", 1, "network", 0)
    trunk, bits = without(network, last_linear(network, point)), DROPPED_BITS.get(precision)
    if precision == "float64":
        trunk, point = trunk.double(), point.double()
    for module in trunk.modules() if bits else ():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = drop_bits(module.weight.data, bits)
            module.register_forward_pre_hook(lambda _, inputs: (drop_bits(inputs[0], bits),))
            if precision == "bf16":
                module.register_forward_hook(lambda _module, _inputs, output: drop_bits(output, bits))
    return central_differences(trunk, point, step=STEP).double()


@cli.one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", default="resnet18", help=cli.ARCH_HELP)
    arch, point = parser.parse_args(argv).arch, draw_point(seed=1)
    nads = load_nads(ROOT / "NADs" / f"{paper_name(arch)}_NADs.npy", point.numel()).double()
    exact = differences(arch, point, "float64") @ nads.T  # (F, D), along the NADs
    print(f"{arch}: noise by signal along NADs " + ", ".join(f"{a}-{b - 1}" for a, b in BANDS))
    for precision in ("fp32", *DROPPED_BITS):
        noise = differences(arch, point, precision) @ nads.T - exact
        ratios = [(noise[:, a:b].square().mean() / exact[:, a:b].square().mean()).sqrt().item() for a, b in BANDS]
        print(f"{precision}: " + "  ".join(f"{ratio:.1e}" for ratio in ratios))


if __name__ == "__main__":
    main()
