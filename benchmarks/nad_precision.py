"""How much noise may the arithmetic add to the NADs? One network in several precisions against float64.

    python -m benchmarks.nad_precision --arch resnet18

Noise by signal, root mean square, of the differences along the arrays in NADs/. tf32 and bf16 are emulated, on any
machine: what convolutions and linear layers take is rounded to 10 or 7 bits of mantissa, for bf16 what they give, too.
"""

import torch
from torch import nn

from models import paper_name
from nad_computation import ROOT, STEP, draw, draw_point
from utils import cli
from utils.last_layer import last_linear, without
from utils.nads import central_differences, load_nads

DROPPED_BITS = {"float64": 0, "fp32": 0, "tf32": 13, "bf16": 16}  # of float32's 23
BANDS = ((0, 10), (100, 110), (500, 510), (900, 910), (1013, 1023))  # of NADs


def drop_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round float32 to nearest, without the last `bits` of its 23 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)).view(torch.float32)


def differences(arch: str, precision: str, point: torch.Tensor) -> torch.Tensor:
    """Those of one network's features along each pixel, (F, D), float64."""
    network, bits = draw(arch, 0, point, seed=1), DROPPED_BITS[precision]
    trunk, kind = without(network, last_linear(network, point)), torch.float64 if precision == "float64" else None
    for module in trunk.modules() if bits else ():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = drop_bits(module.weight.data, bits)
            module.register_forward_pre_hook(lambda _, inputs: (drop_bits(inputs[0], bits),))
            if precision == "bf16":
                module.register_forward_hook(lambda _module, _inputs, output: drop_bits(output, bits))
    return central_differences(trunk.to(kind), point.to(kind or point.dtype), step=STEP).double()


if __name__ == "__main__":
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--arch", default="resnet18", help="one with arrays in NADs/")
    name = paper_name(arch := parser.parse_args().arch)
    nads, point = load_nads(ROOT / "NADs" / f"{name}_NADs.npy", 1024).double().T, draw_point(seed=1)
    exact, *others = (differences(arch, precision, point) @ nads for precision in DROPPED_BITS)
    print(" | ".join([name, *(f"NADs {a}–{b - 1}" for a, b in BANDS)]))
    for precision, values in zip(list(DROPPED_BITS)[1:], others, strict=True):
        pairs = [((values - exact)[:, a:b].square().mean(), exact[:, a:b].square().mean()) for a, b in BANDS]
        print(" | ".join([precision, *(f"{(noise / signal).sqrt():.1e}" for noise, signal in pairs)]))
