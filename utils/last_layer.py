"""The linear layer that ends a network: taking it off, and the variance of its weights."""

import torch
from torch import nn

NO_MARGINAL = "the marginal estimator integrates out a last linear layer, but {}: use --estimator sampled"


def split_last_linear(model: nn.Module, point: torch.Tensor) -> tuple[nn.Module, nn.Linear]:
    """Take off the linear layer that ends the model: f(x) = w·h(x) + b.

    Args:
        model: evaluated once at the point, and changed: an identity stands where its last layer was.
        point: an image (C, H, W).

    Returns:
        The trunk h, which maps (N, C, H, W) to (N, F), and the layer.

    Raises:
        ValueError: the output is not that of a linear layer on (N, F) features, the layer is used or owned more than
            once, or its weights are zero or not of mean zero, so that there is nothing to integrate out.
    """
    calls: list[tuple[nn.Linear, torch.Tensor]] = []
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_hook(lambda layer, inputs, output: calls.append((layer, inputs[0]))) for module in names
    ]
    with torch.no_grad():
        model(point[None].clone())
    for hook in hooks:
        hook.remove()
    if not calls or calls[-1][1].ndim != 2 or not ends_network(model, calls[-1][0], point):
        raise ValueError(NO_MARGINAL.format("this network does not end in one"))
    layer = calls[-1][0]
    owners = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is layer.weight]
    if len(owners) > 1 or sum(called is layer for called, _ in calls) > 1:
        raise ValueError(NO_MARGINAL.format(f"this network shares its weights ({', '.join(owners)})"))
    if not layer.weight.any():
        raise ValueError("the weights of the last linear layer are all zero at initialisation: no input gradient")
    check_zero_mean(weight_statistics(layer))
    parent, _, name = names[layer].rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    return model, layer


@torch.no_grad()
def ends_network(model: nn.Module, layer: nn.Linear, point: torch.Tensor) -> bool:
    """Whether the model returns what the layer gives as it is, both large negative and positive values."""
    given = layer.weight.new_tensor([[-1e4], [1e4]]).repeat(1, layer.out_features)
    hook = layer.register_forward_hook(lambda *_: given.clone())
    output = model(point.repeat(2, 1, 1, 1))
    hook.remove()
    return isinstance(output, torch.Tensor) and torch.equal(output.flatten(), given.flatten())


def weight_statistics(layer: nn.Linear) -> torch.Tensor:
    """(number, Σw, Σw², number beyond 1/√fan_in, Σ fan_in) of a layer's weights, float64: they add up over networks."""
    weights = layer.weight.double()
    beyond = (weights.abs() > layer.in_features**-0.5 * (1 + 1e-6)).sum()
    number, sums = weights.numel(), torch.stack([weights.sum(), weights.square().sum(), beyond.double()])
    return torch.tensor([number, *sums.tolist(), number * layer.in_features], dtype=torch.float64)


def check_zero_mean(statistics: torch.Tensor) -> None:
    """Refuse weights whose mean is more than six standard errors from zero."""
    number, total, squares, *_ = statistics.tolist()
    if not abs(total) <= 6 * squares**0.5:  # the standard error of Σw is √(Σw²) for a mean of zero; nan fails too
        raise ValueError(NO_MARGINAL.format(f"the mean of its weights is {total / number:.2g}, not zero"))


def weight_variance(statistics: torch.Tensor) -> float:
    """σ_w² of the last layer from the statistics of the weights of all drawn networks.

    PyTorch's nn.Linear draws from U(−1/√fan_in, 1/√fan_in), of variance 1/(3·fan_in). That is taken where no weight
    lies beyond these bounds and the pooled variance is within four of its standard errors; otherwise the pooled one.
    """
    number, _, squares, beyond, fan_ins = statistics.tolist()
    pooled, default = squares / number, 1 / (3 * (fan_ins / number))
    standard_error = default * (0.8 / number) ** 0.5  # Var w² = (4/5)·(σ²)² for a uniform w
    return default if beyond == 0 and abs(pooled - default) < 4 * standard_error else pooled
