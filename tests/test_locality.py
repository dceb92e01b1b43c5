"""Local evaluation gives what the plain one gives, with fewer operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from utils.differences import central_differences, may_be_local
from utils.locality import LocalBatch, shifted_images, whole


class Branching(nn.Module):
    """Two convolutions of one input side by side, added or concatenated, a pool, and a last convolution."""

    def __init__(self, channels, kernels, stride, add, pool, last):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(channels, 3, 3, padding=1)
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
    shape=st.tuples(st.integers(1, 2), st.integers(11, 16), st.integers(11, 16)),
    kernels=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    stride=st.sampled_from([1, 2, 3]),
    add=st.booleans(),
    pool=st.sampled_from([None, F.max_pool2d, F.avg_pool2d]),
    last=st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1), (3, 2)]),
    chunk_size=st.sampled_from([2, 8, 32, 200]),
)
@settings(max_examples=60)
def test_the_differences_are_those_of_the_plain_way(shape, kernels, stride, add, pool, last, chunk_size):
    network = Branching(shape[0], kernels, stride, add, pool, last).double().eval()
    point = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = central_differences(network, point, chunk_size=chunk_size)
    local = central_differences(network, point, chunk_size=chunk_size, local=True)
    torch.testing.assert_close(local, plain, rtol=1e-9, atol=1e-12)


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
    assert may_be_local(network, point)


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


class LosesItsChange(nn.Module):
    """Changes the result of a layer in place by a function without a rule, and goes on with it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        """Map images to features (N, F)."""
        x = self.conv(x)
        x.cos_()
        return x.flatten(1)


class AsksForTheBatch(nn.Module):
    """Batch statistics, an unusual convolution, a pool with padding: layers without a rule see whole images."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, dilation=2), nn.BatchNorm2d(4, momentum=None),
            nn.MaxPool2d(3, 2, padding=1), nn.InstanceNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False),
        )  # fmt: skip

    def forward(self, x):
        """Map images to features (N, F)."""
        return self.layers(x).flatten(1)


def test_a_network_that_changes_its_tensors_in_place_is_found_out():
    point = torch.randn(1, 9, 9)
    assert not may_be_local(LosesItsChange().eval(), point)
    assert may_be_local(AsksForTheBatch().eval(), point)


def test_a_network_that_gives_no_number_is_not_local():
    assert not may_be_local(lambda x: x.flatten(1) * torch.nan, torch.randn(1, 4, 4))
