"""Small convolutions as matrix products: exact where bf16 is, chosen where they should be, and only there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from utils import convolution
from utils.convolution import product
from utils.training import precision_mode


def whole_numbers(*shape, seed):
    """From −1 to 1: their sums of up to 256 terms are exact in bf16."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def convolutions(draw):
    """Images (N, C, H, W) and a layer whose sides have each their own kernel, stride and padding."""
    kernel, stride, padding = (
        tuple(draw(st.tuples(*[st.integers(low, high)] * 2))) for low, high in ((1, 3), (1, 3), (0, 2))
    )
    sides = [draw(st.integers(max(1, k - 2 * p), 6)) for k, p in zip(kernel, padding, strict=True)]
    channels = draw(st.sampled_from([(1, 2), (3, 1), (4, 5)]))
    layer = nn.Conv2d(*channels, kernel, stride, padding, bias=draw(st.booleans()))
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = whole_numbers(*parameter.shape, seed=number)
    return whole_numbers(2, channels[0], *sides, seed=9).requires_grad_(), layer


@given(convolutions(), st.booleans())
def test_a_product_is_the_convolution_and_so_are_its_gradients(drawn, channels_last):
    x, layer = drawn
    if channels_last:
        layer.to(memory_format=torch.channels_last)
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = layer(x)
    sources, gradient = (x, *layer.parameters()), whole_numbers(*expected.shape, seed=8)
    with torch.autocast("cpu", torch.bfloat16):
        found = product(layer, x)
        gradients = torch.autograd.grad(found, sources, gradient.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, sources, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class Padded(nn.Conv2d):
    """A layer that does more than its class, as users write them."""

    def forward(self, x):
        """Pad, then convolve."""
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@pytest.fixture
def products(monkeypatch):
    """The layers that were products, one for each time."""
    layers = []
    monkeypatch.setattr(convolution, "product", lambda layer, x: layers.append(layer) or product(layer, x))
    return layers


@pytest.mark.parametrize(
    ("size", "layer", "as_product"),
    [
        ((4, 4), nn.Conv2d(2, 256, 3, padding=1), True),
        ((2, 8), nn.Conv2d(2, 256, 3, padding=1), True),
        ((8, 8), nn.Conv2d(2, 256, 1, stride=2), True),
        ((8, 8), nn.Conv2d(2, 256, 3), False),
        ((4, 4), nn.Conv2d(2, 255, 3), False),
        ((4, 4), nn.Conv2d(2, 256, 3, groups=2), False),
        ((4, 4), nn.Conv2d(2, 256, 3, dilation=2, padding=2), False),
        ((4, 4), nn.Conv2d(2, 256, 3, padding="same"), False),
        ((4, 4), nn.Conv2d(2, 256, 3, padding=1, padding_mode="reflect"), False),
        ((4, 4), Padded(2, 256, 3), False),
    ],
)
def test_only_small_and_wide_outputs_of_plain_layers_are_products(products, size, layer, as_product):
    x = torch.randn(2, 2, *size)
    with precision_mode("bf16", "cpu"):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)
    assert products == [layer] * as_product


def test_a_recomputed_layer_is_a_product_both_times_and_other_calls_are_as_before(products):
    layer, x = nn.Conv2d(2, 256, 3, padding=1), torch.randn(2, 2, 4, 4, requires_grad=True)
    with precision_mode("bf16", "cpu"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert len(products) == 2
        layer(x[0])
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            nn.Conv2d(2, 256, 5)(x)
    with precision_mode("fp32", "cpu"):
        layer(x)
    assert len(products) == 2
