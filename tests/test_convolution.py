"""Small convolutions as matrix products: exact where bf16 is, chosen where they should be, and only there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from utils import convolution
from utils.training import precision_mode


def whole_numbers(*shape, seed):
    """From −1 to 1: their sums of up to 256 terms are exact in bf16."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def convolutions(draw):
    """Images and a layer, (N, C, H, W) and nn.Conv2d, each side with its own kernel, stride and padding."""
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
    with precision_mode("bf16", "cpu"):
        found = layer(x)
        gradients = torch.autograd.grad(found, sources, gradient.bfloat16())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, sources, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the outputs that were made as products."""
    shapes, product = [], convolution.product

    def noted(*arguments):
        y = product(*arguments)
        shapes.append(tuple(y.shape[2:]))
        return y

    monkeypatch.setattr(convolution, "product", noted)
    return shapes


@pytest.mark.parametrize(
    ("size", "options", "as_product"),
    [
        (4, {}, True),
        ((2, 8), {}, True),
        (8, {"stride": 2}, True),
        (8, {}, False),
        (5, {}, False),
        (4, {"groups": 2}, False),
        (4, {"dilation": 2, "padding": 2}, False),
        (4, {"padding": "same"}, False),
        (4, {"padding_mode": "reflect"}, True),
    ],
)
def test_only_small_outputs_of_plain_layers_are_products(products, size, options, as_product):
    layer = nn.Conv2d(2, 4, 3, **{"padding": 1} | options)
    x = torch.randn(2, 2, *(size if isinstance(size, tuple) else (size, size)))
    with precision_mode("bf16", "cpu"):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)
    assert products == ([tuple(y.shape[2:])] if as_product else [])


def test_other_precisions_single_images_and_calls_by_name_are_left_as_they_are(products):
    layer, x = nn.Conv2d(2, 4, 3), torch.randn(2, 4, 4)
    with precision_mode("fp32", "cpu"):
        layer(x[None])
    with precision_mode("bf16", "cpu"):
        layer(x)
        F.conv2d(x[None], layer.weight, padding=1)
    assert not products
