"""Local evaluation gives what the plain one gives, with fewer operations."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from utils.differences import central_differences, local_pays
from utils.locality import LocalBatch, shifted_images, whole


class Branching(nn.Module):
    """Two convolutions of one input side by side, added or concatenated, a pool, and a last convolution."""

    def __init__(self, channels, first, kernels, stride, add, pool, last):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(channels, 3, first[0], first[1], padding=first[0] // 2)
        self.norm = nn.BatchNorm2d(3)
        self.branches = nn.ModuleList(nn.Conv2d(3, 4, k, stride, padding=k // 2) for k in kernels)
        self.add, self.pool = add, pool
        self.last = nn.Conv2d(4 if add else 8, 2, last[0], padding=last[1], bias=False)

    def forward(self, x):
        """Map images to features (N, F)."""
        x = F.relu(self.norm(self.first(x)), inplace=True)
        a, b = (branch(x) for branch in self.branches)
        x = a + b if self.add else torch.cat([a, b], 1)
        return self.last(self.pool(x, 2) if self.pool else x).flatten(1)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(24, 32), st.integers(24, 32)),
    first=st.sampled_from([(1, 1), (1, 2), (3, 1), (3, 2)]),
    kernels=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    stride=st.sampled_from([1, 2, 3, 4]),
    add=st.booleans(),
    pool=st.sampled_from([None, F.max_pool2d, F.avg_pool2d]),
    last=st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1), (3, 2)]),
    phase=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    spacing=st.sampled_from([4, 8, 16]),
)
@settings(max_examples=150)
@torch.no_grad()
def test_the_images_give_what_whole_ones_give(shape, first, kernels, stride, add, pool, last, phase, spacing):
    network = Branching(shape[0], first, kernels, stride, add, pool, last).double().eval()
    point = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images, _ = shifted_images(point, shape[0] - 1, phase, spacing, 100.0)
    try:
        expected = network(whole(images))
    except RuntimeError:  # the last kernel is larger than what is left of the image
        assume(False)
    torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [2, 8, 40])
def test_the_differences_are_those_of_the_plain_way(chunk_size):
    network = nn.Sequential(nn.LeakyReLU(inplace=True), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten())
    point = torch.randn(2, 9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = point.clone()
    plain = central_differences(network.double(), point, chunk_size=chunk_size, step=0.1)
    local = central_differences(network, point, chunk_size=chunk_size, step=0.1, local=True)
    torch.testing.assert_close(local, plain, rtol=1e-9, atol=1e-12)
    assert torch.equal(point, before)


@pytest.mark.parametrize("arch", ["logreg", "lenet", "vgg11", "resnet18", "densenet121", "torchvision:mobilenet_v2"])
@torch.no_grad()
def test_each_architecture_sees_the_same_images(arch):
    channels = 3 if arch.startswith("torchvision") else 1
    torch.manual_seed(0)
    network = build_model(arch, channels, 1).double().eval()
    point = torch.randn(channels, 32, 32, dtype=torch.float64)
    for first in [(0, 0), (15, 15), (7, 2)]:  # windows at the border, and in the middle
        images, _ = shifted_images(point, 0, first, 16, 100.0)
        torch.testing.assert_close(network(images), network(whole(images)), rtol=1e-9, atol=1e-12)
    assert local_pays(network, point) == (arch != "logreg")


@pytest.mark.parametrize(
    ("arch", "share"), [("lenet", 0.55), ("vgg11", 0.8), ("resnet18", 0.75), ("densenet121", 0.75)]
)
@torch.no_grad()
def test_fewer_operations_are_needed(arch, share):
    network = build_model(arch, 1, 1).eval()
    images, _ = shifted_images(torch.randn(1, 32, 32), 0, (3, 4), 8, 100.0)
    counts = []
    for batch in (whole(images), images):
        with FlopCounterMode(display=False) as counter:
            network(batch)
        counts.append(counter.get_total_flops())
    assert counts[1] < share * counts[0]


def test_the_images_are_the_point_with_one_pixel_moved():
    point = torch.randn(2, 5, 7)
    images, pixels = shifted_images(point, 1, (1, 2), 2, 3.0)
    assert isinstance(images, LocalBatch) and images.shape == (12, 2, 5, 7)
    expected = torch.zeros(6, 70).index_put((torch.arange(6), pixels), torch.tensor(3.0)).view(6, 2, 5, 7)
    torch.testing.assert_close(whole(images), torch.cat([point + expected, point - expected]))
    assert pixels.tolist() == [35 + 7 * row + column for row in (1, 3) for column in (2, 4, 6)]


class Unusual(nn.Module):
    """A convolution, and then whatever a function makes of it."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.function = function

    def forward(self, x):
        """Map images to features (N, F)."""
        return self.function(self.conv(x)).flatten(1)


def changed_by(function):
    """A function that changes its argument, and gives that back instead of the result."""

    def change(x):
        function(x)
        return x

    return change


@pytest.mark.parametrize(
    "function",
    [
        changed_by(lambda x: x.cos_()),
        changed_by(lambda x: F.threshold(x, 0.1, 0.0, inplace=True)),
        changed_by(lambda x: x.__setitem__((slice(None), 0), 1.0)),
        changed_by(lambda x: torch.cos(x, out=x)),
    ],
    ids=["cos_", "threshold", "setitem", "out"],
)
def test_what_windows_cannot_follow_is_found_out(function):
    point = torch.randn(1, 16, 16)
    network = Unusual(function)
    assert not local_pays(network, point)
    plain, local = (central_differences(network, point, local=local) for local in (False, True))
    torch.testing.assert_close(local, plain)


def test_what_bypasses_the_dispatch_is_found_out():
    network = Unusual(torch.vmap(lambda x: F.conv2d(x[None], torch.ones(1, 4, 3, 3))[0]))
    assert not local_pays(network, torch.randn(1, 16, 16))


@pytest.mark.parametrize(
    "function",
    [
        changed_by(lambda x: F.relu(x, inplace=True)), changed_by(lambda x: F.hardtanh(x, inplace=True)),
        lambda x: torch.relu(input=x), lambda x: F.avg_pool2d(input=x, kernel_size=2), lambda x: F.avg_pool2d(x, (2,)),
        lambda x: F.conv2d(x, torch.ones(4, 1, 3, 3), None, (1,), (1,), groups=4), lambda x: F.interpolate(x, (5, 5)),
        lambda x: F.conv2d(x, torch.ones(1, 4, 3, 3), dilation=2), lambda x: F.max_pool2d(x, 3, 2, padding=1),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0], lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
        lambda x: F.instance_norm(x), lambda x: F.batch_norm(x, None, None, training=True), lambda x: x.mT,
        lambda x: torch.cat([x, x], dim=-3), lambda x: torch.cat(tensors=[x, x], dim=1), lambda x: x[:, ::2],
        lambda x: x.mean((2, 3)), lambda x: x * x.mean((2, 3), keepdim=True), lambda x: torch.stack([x, x]).sum(0),
        lambda x: x.data.sin(), lambda x: (x + 1.0) + torch.ones(1, 4, 1, 1), lambda x: F.pixel_shuffle(x, 2),
    ],
)  # fmt: skip
@torch.no_grad()
def test_layers_without_a_rule_see_whole_images(function):
    network = Unusual(function)
    images, _ = shifted_images(torch.randn(1, 16, 16), 0, (1, 2), 8, 100.0)
    torch.testing.assert_close(network(images), network(whole(images)))


@torch.no_grad()
def test_a_sum_in_place_changes_the_tensor_by_all_its_names():
    def twice(x):
        same = x
        x += F.avg_pool2d(x, 1)
        return same + x

    images, _ = shifted_images(torch.randn(1, 16, 16), 0, (1, 2), 8, 100.0)
    torch.testing.assert_close(Unusual(twice)(images), Unusual(twice)(whole(images)))


def test_a_network_that_gives_no_number_or_always_the_same_is_not_local():
    assert not local_pays(lambda x: x.flatten(1) * torch.nan, torch.randn(1, 8, 8))
    assert not local_pays(Unusual(torch.zeros_like), torch.randn(1, 8, 8))
