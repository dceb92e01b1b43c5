"""Random networks, and their last layer integrated out: closed forms, the average over many heads, refusals."""

import pytest
import torch
from torch import nn

from models import build_model
from tests import tiny_networks
from utils.last_layer import draw_network, last_linear, network_rows, weight_rms, without
from utils.nads import central_differences


def draw(name, number=0, size=8):
    """A tiny network, or one of the paper's, and a point."""
    arch = f"tests.tiny_networks:{name}" if hasattr(tiny_networks, name) else name
    point = torch.randn(1, size, size, generator=torch.Generator().manual_seed(0))
    return draw_network(lambda: build_model(arch, 1, 1, size), "cpu", "network", number), point


def test_a_network_depends_on_its_seed_alone_is_in_evaluation_mode_and_leaves_the_random_state_alone():
    first, state = draw("vgg11", 3, 32)[0], torch.get_rng_state()
    torch.randn(7)
    moved = torch.get_rng_state()
    again, other = draw("vgg11", 3, 32)[0], draw("vgg11", 4, 32)[0]
    assert torch.equal(torch.get_rng_state(), moved) and not torch.equal(moved, state)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.classifier[-1].weight, other.classifier[-1].weight)
    assert not any(m.training for m in first.modules()) and not any(p.requires_grad for p in first.parameters())


def test_the_gradient_of_a_linear_model_is_its_weight_row_and_integrated_out_every_pixel_has_its_rms():
    network, point = draw("logreg")
    weight = network.output_fc.weight.clone()
    torch.testing.assert_close(network_rows(network, point, estimator="sampled", step=100.0), weight, rtol=0, atol=1e-6)
    rows = network_rows(network, point, step=100.0)
    torch.testing.assert_close(rows, weight.square().mean().sqrt() * torch.eye(64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["plain", "lenet", "reparametrised_head", "ten_outputs", "zero_head"])
def test_a_network_is_its_trunk_and_then_its_last_layer(name):
    network, point = draw(name, size=16 if name == "lenet" else 8)
    whole, layer = network(point[None]), last_linear(network, point)
    torch.testing.assert_close(layer(without(network, layer)(point[None])), whole, rtol=0, atol=0)


NO_LINEAR_END = "ends_in_convolution ends_in_relu ends_in_clamp ends_in_cosine ends_in_hook"


@pytest.mark.parametrize("name", [*NO_LINEAR_END.split(), "MeanOfTokens", "TiedWeights", "UsedTwice"])
def test_a_last_layer_that_is_not_the_end_or_not_independent_of_the_trunk_is_none(name):
    network, point = draw(name)
    before = point.clone()
    assert last_linear(network, point) is None and torch.equal(point, before)
    with pytest.raises(ValueError, match="the network does not end in a linear layer of its own"):
        network_rows(network, point, step=100.0)


def test_the_marginal_rows_are_the_average_over_many_sampled_heads_on_the_same_trunk():
    network, point = draw("plain", 5)
    layer, scale = network.head, weight_rms(network.head)
    heads = nn.Linear(16, 5000).requires_grad_(False)  # as many draws of a head, each of the default σ_w² = 1/(3·16)
    sampled = central_differences(lambda x: heads(network.features(x)), point, step=100.0)  # (5000, D)
    rows = network_rows(network, point, step=100.0) / scale / 48**0.5
    assert rows.shape == (layer.in_features, 64)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:8]
    marginal = (rows @ directions.T).square().sum(0)
    average = (sampled @ directions.T).square().mean(0)
    torch.testing.assert_close(average, marginal, rtol=5 * (2 / 5000) ** 0.5, atol=0)


def test_the_scale_is_the_rms_of_the_layers_own_weights_and_a_convention_where_they_are_zero():
    layer = nn.Linear(5, 3)
    assert weight_rms(layer) == pytest.approx(layer.weight.square().mean().sqrt().item())
    nn.init.zeros_(layer.weight)
    assert weight_rms(layer) == (3 * 5) ** -0.5
    nn.init.constant_(layer.weight, 0.1)  # 15 weights of one sign are no proof of another mean
    assert weight_rms(layer) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "estimator", "words"),
    [
        ("positive_head", "marginal", r"weights of the last layer have mean 0\.05\d*, not zero"),
        ("nan_head", "marginal", "weights of the last layer have mean nan"),
        ("nan_head", "sampled", "differences of a random network are not finite"),
        ("nan_trunk", "marginal", "differences of a random network are not finite"),
        ("ten_outputs", "sampled", "has 10 outputs: the sampled estimator needs one"),
    ],
)
def test_rows_that_would_be_wrong_are_refused(name, estimator, words):
    network, point = draw(name)
    with pytest.raises(ValueError, match=words):
        network_rows(network, point, estimator=estimator, step=100.0)
