"""Random networks, and the rows that each contributes to the covariance of the gradient: its last layer integrated out.

All the paper's networks end in a linear layer, f = w·h + b. Its weights are independent of the trunk h, have mean zero
and variance σ_w², so E[g gᵀ | trunk] = σ_w² Δᵀ Δ with Δ (F, D) the differences of the features, one row per feature.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from refusals import Refusal
from utils import seeding
from utils.layout import layout_of
from utils.nads import central_differences
from utils.precision import set_fp32


def draw_network(build: Callable[[], nn.Module], device: torch.device | str, *seed: int | str) -> nn.Module:
    """A network fresh from its factory, built on its device from this seed, in evaluation mode."""
    set_fp32("fp32", device)
    with seeding.default_generator(device, *seed), torch.device(device):
        model = build()
    return model.to(device, memory_format=layout_of(model)).eval().requires_grad_(False)


def network_rows(
    network: nn.Module,
    point: torch.Tensor,
    *,
    estimator: str = "marginal",
    step: float,
    directions: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows whose outer products add up to a network's estimate of the covariance of the gradient at `point`.

    sampled: (1, D), the gradient estimate g of the network (N, C, H, W) -> (N, 1) as it is. marginal: (F, D), σ_w·Δ,
    with the rms of the last layer's weights for σ_w; the network loses that layer. Along n `directions` instead of the
    pixels, n takes the place of D. A Refusal if the estimator does not fit the network, or the rows are not finite.
    """
    scale = 1.0
    if estimator == "marginal":
        layer = last_linear(network, point)
        if layer is None:
            raise Refusal("the network does not end in a linear layer of its own: use --estimator sampled")
        scale = weight_rms(layer)
        network = without(network, layer)
    rows = scale * central_differences(network, point, directions=directions, step=step)
    if estimator == "sampled" and len(rows) != 1:
        raise Refusal(f"the network has {len(rows)} outputs: the sampled estimator needs one")
    if not rows.isfinite().all():
        raise Refusal(f"the differences of a random network are not finite (step {step:g})")
    return rows


@torch.no_grad()
def last_linear(network: nn.Module, point: torch.Tensor) -> nn.Linear | None:
    """The linear layer on (N, F) features whose output the network returns as it is, if it ends in one of its own.

    None for a layer that is called twice, or shares its weights with another: it is not independent of the trunk. Also
    None if it computes anything else than W·h + b, by a hook or as a subclass.
    """
    calls: list[tuple[nn.Linear, int]] = []
    hooks = [
        module.register_forward_hook(lambda layer, _, output: calls.append((layer, getattr(output, "ndim", 0))))
        for module in network.modules()
        if isinstance(module, nn.Linear)
    ]
    network(point[None].clone())  # its first layer may work in place
    for hook in hooks:
        hook.remove()
    if not calls or calls[-1][1] != 2:
        return None
    layer = calls[-1][0]
    owners = [weight for _, weight in network.named_parameters(remove_duplicate=False) if weight is layer.weight]
    if len(owners) > 1 or sum(called is layer for called, _ in calls) > 1 or not is_linear(layer):
        return None
    given = layer.weight.new_tensor([[-1e4], [1e4]]).repeat(1, layer.out_features)
    hook = layer.register_forward_hook(lambda *_: given.clone())
    output = network(point.repeat(2, 1, 1, 1))
    hook.remove()
    ends = torch.equal(output.flatten(), given.flatten())
    return layer if ends else None


def is_linear(layer: nn.Linear) -> bool:
    """Whether a layer, with its hooks, computes W·h + b."""
    features = torch.linspace(-1e3, 1e3, 2 * layer.in_features).to(layer.weight).view(2, -1)
    output, expected = layer(features.clone()), F.linear(features, layer.weight, layer.bias)
    scale = expected.nan_to_num().abs().max().item()
    return output.shape == expected.shape and torch.allclose(output, expected, atol=1e-5 * scale, equal_nan=True)


def estimator_for(network: nn.Module, point: torch.Tensor) -> str:
    """The better estimator that fits a network: "marginal" if it ends in a linear layer of its own, or "sampled"."""
    return "sampled" if last_linear(network, point) is None else "marginal"


def without(network: nn.Module, layer: nn.Linear) -> nn.Module:
    """The trunk h, which maps (N, C, H, W) to (N, F): an identity stands where the layer was."""
    (name,) = (name for name, module in network.named_modules() if module is layer)
    parent, _, name = name.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return network


def weight_rms(layer: nn.Linear) -> float:
    """The rms of a layer's weights, an estimate of σ_w that is independent of the trunk.

    Where they are all zero (torchvision's ViT), PyTorch's default σ_w = 1/√(3·fan_in): the scale is then a convention.

    Raises:
        Refusal: their mean is more than six standard errors from zero.
    """
    weights = layer.weight.double()
    if not weights.any():
        return (3 * layer.in_features) ** -0.5
    total, squares = weights.sum().item(), weights.square().sum().item()
    if not abs(total) <= 6 * squares**0.5:  # the standard error of Σw is √(Σw²) for a mean of zero; nan fails too
        mean = total / weights.numel()
        raise Refusal(f"the weights of the last layer have mean {mean:.2g}, not zero: use --estimator sampled")
    return (squares / weights.numel()) ** 0.5
