"""Nothing is left on the wrong device: what touches one runs on tensors that only claim to be on a GPU.

torch's fake tensors have a shape, a type and a device but no values, and refuse operations across devices as real ones
do. What depends on values, or on the GPU itself, is given a stand-in by the fixture `gpu`; the product's code is run as
it is. Backpropagation is left out, as autograd's engine asks for a real GPU; and fake tensors let pass an index on the
GPU into a tensor on the CPU.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

import directional_bias
import poison_cifar
from models import build_model
from nad_computation import compute_nads, draw_point
from predict import squared_differences
from utils import cifar, training
from utils.last_layer import draw_network, network_rows
from utils.nads import GradientSums, nads_of_covariance

GPU = torch.device("cuda", 0)
PLAIN = "tests.tiny_networks:plain"


class Generators(TorchFunctionMode):
    """Refuses a generator of another device than the numbers it draws, as torch does of real tensors."""

    def __init__(self):
        super().__init__()
        self.devices = {}

    def make(self, device="cpu"):
        """What stands in for torch.Generator: one of the CPU, of which the device is remembered."""
        generator = torch.default_generator.clone_state()
        self.devices[generator] = torch.device(device).type
        return generator

    def __torch_function__(self, function, types, args=(), kwargs=None):
        generator = (kwargs or {}).get("generator")
        if generator is not None:
            assert self.devices[generator] == torch.device((kwargs or {}).get("device") or "cpu").type
        return function(*args, **kwargs or {})


def move(module, device=None, *, memory_format=torch.preserve_format):
    """What stands in for Module.to, which fake tensors do not let exchange the parameters' contents."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:  # a layer without bias
                    continue
                layout = memory_format if tensor.ndim == 4 else torch.preserve_format
                moved = tensor.detach().to(device or tensor.device, memory_format=layout)
                kept = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(moved, tensor.requires_grad) if kept else moved
    return module


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Fake tensors, and stand-ins for what they cannot: to look at values, and to ask the GPU for random numbers."""
    generators, fork_rng = Generators(), torch.random.fork_rng
    monkeypatch.setattr(torch, "Generator", generators.make)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork_rng([]))
    monkeypatch.setattr(nn.Module, "to", move)
    for compare in ("equal", "allclose"):
        monkeypatch.setattr(torch, compare, lambda a, b, **_: a.device == b.device)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: 1)
    monkeypatch.setattr(torch.Tensor, "unique", lambda labels: labels[:2])
    monkeypatch.setattr(torch.Tensor, "numpy", to_numpy)
    with FakeTensorMode(shape_env=ShapeEnv()), generators:
        yield


def to_numpy(tensor):
    """What stands in for Tensor.numpy, which is of the CPU's tensors alone."""
    assert tensor.device.type == "cpu"
    return np.ones(tensor.shape)


def on_gpu(*tensors):
    return all(tensor.device == GPU for tensor in tensors)


def image(channels=1, size=8):
    return torch.ones(channels, size, size, device=GPU)


def test_a_tensor_on_the_wrong_device_is_refused():
    with pytest.raises(RuntimeError, match="device"):
        image() + torch.ones(1)
    with pytest.raises(AssertionError):
        torch.randn(3, device=GPU, generator=torch.Generator("cpu"))
    with pytest.raises(AssertionError):
        image().numpy()


@pytest.fixture
def no_backward(monkeypatch):
    """Gradients of nothing; each training must be of parameters on the GPU."""
    held, init = [], torch.optim.SGD.__init__

    def hold(optimizer, parameters, **options):
        held[:] = parameters
        assert on_gpu(*held)
        init(optimizer, parameters, **options)

    def backward(loss):
        assert on_gpu(loss)
        for parameter in held:
            parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(torch.optim.SGD, "__init__", hold)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(training, "as_graphs", lambda model, *_: model)  # a recording asks for a real GPU
    return held


def test_a_training_of_experiment_1(no_backward):
    sizes = {"num_train": 10, "num_test": 7, "epochs": 1}
    assert directional_bias.train_on_direction(image(), arch=PLAIN, until_loss=0.1, **sizes).keys() >= {"steps"}
    assert no_backward


@pytest.mark.parametrize("estimator", ["marginal", "sampled"])
def test_a_network_its_rows_and_their_sum(estimator):
    point, sums = draw_point(1, 8).to(GPU), GradientSums(64, GPU)
    network = draw_network(lambda: build_model(PLAIN, 1, 1, 8), GPU, 0)
    sums.add(0, network_rows(network, point, estimator=estimator, step=100.0))
    assert on_gpu(sums.outer, sums.total)
    nads_of_covariance(sums.covariance(estimator))


@pytest.mark.parametrize("estimator", ["marginal", "sampled"])
def test_nads(estimator):
    _, sums = compute_nads(PLAIN, estimator=estimator, num_networks=2, image_size=8, device=GPU)
    assert on_gpu(sums.outer)


@pytest.mark.parametrize("arch", [PLAIN, "tests.tiny_networks:ends_in_relu"])
def test_a_prediction(arch):
    along, random = squared_differences(torch.ones(3, 1, 8, 8, device=GPU), arch=arch, num_networks=2)
    assert along.shape == (2, 3) and random.shape == (2,)


@pytest.mark.parametrize("transform", ["poison", "flip", "none"])
def test_a_training_of_experiment_3(no_backward, transform):
    pixels, labels = torch.ones(10, 3, 32, 32, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    data = cifar.ImageData(pixels, labels, pixels[:7], labels[:7], ("a", "b")).to(GPU)
    images = poison_cifar.prepare(data, transform=transform, nads=torch.ones(1024, 1024, device=GPU))
    poison_cifar.train_and_test(images, data.train_labels, data.test_labels, arch="logreg", num_classes=2, epochs=1)
    assert no_backward


@pytest.mark.parametrize("arch", ["logreg", "lenet", "vgg11", "resnet18", "densenet121"])
def test_every_architecture(arch):
    with GPU:
        network = build_model(arch, 3, 10)
    assert on_gpu(network(image(3, 32)[None].repeat(2, 1, 1, 1)))
