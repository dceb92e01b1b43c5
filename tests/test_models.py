"""The architectures: shapes, state-dict keys, initial weights; and the names that the registry knows."""

import math
import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import DenseNet121, LeNet, LogReg, ResNet18, VGG11_bn, build_model, canonical_name, identity, paper_name
from models.densenet import Bottleneck, Transition
from models.registry import ARCHITECTURES

IMAGE_MODELS = [LeNet, VGG11_bn, ResNet18, DenseNet121]
PAPER_NAMES = ["LogReg", "vgg11 (bn)", "LeNet", "VGG-11", "ResNet-18", "Dense Net 121"]


@pytest.fixture
def meta():
    """Shapes without arithmetic."""
    with torch.device("meta"):
        yield


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def conv_shapes(name, out_channels, in_channels, k):
    return {f"{name}.weight": (out_channels, in_channels, k, k), f"{name}.bias": (out_channels,)}


def linear_shapes(name, out_features, in_features):
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


@pytest.mark.parametrize(("pooling", "features"), [(True, 16 * 5 * 5), (False, 16 * 24 * 24)])
def test_lenet_has_the_authors_keys_and_shapes(meta, pooling, features):
    convolutions = conv_shapes("conv1", 6, 3, 5) | conv_shapes("conv2", 16, 6, 5)
    hidden = linear_shapes("fc1", 120, features) | linear_shapes("fc2", 84, 120)
    assert shapes(LeNet(pooling=pooling)) == convolutions | hidden | linear_shapes("fc3", 10, 84)


def torchvisions(name):
    """Build torchvision's network, without weights, with this repository's stem and classifier."""
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=10)
        if name.startswith("vgg"):
            model.avgpool = nn.Identity()
            model.classifier[0], model.classifier[3] = nn.Linear(512, 512), nn.Linear(512, 512)
            model.classifier[6] = nn.Linear(512, 10)
            return model
        stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        if name == "resnet18":
            model.conv1, model.maxpool = stem, nn.Identity()
        else:
            model.features.conv0, model.features.norm0, model.features.pool0 = stem, nn.Identity(), nn.Identity()
    return model


def the_authors(key):
    """Return the authors' name of a parameter of torchvision's ResNet-18 or DenseNet-121."""
    key = re.sub(r"denseblock(\d)\.denselayer(\d+)", lambda m: f"dense{m[1]}.{int(m[2]) - 1}", key)
    for theirs, name in {"downsample": "shortcut", "fc": "linear", "transition": "trans", "conv0": "conv1"}.items():
        key = key.replace(theirs, name)
    return key.removeprefix("features.").replace("norm5", "bn").replace("norm", "bn").replace("classifier", "linear")


@pytest.mark.parametrize(
    ("model", "name", "rename"),
    [
        (VGG11_bn, "vgg11_bn", str),
        (ResNet18, "resnet18", the_authors),
        (DenseNet121, "densenet121", the_authors),
    ],
)
def test_networks_agree_with_torchvisions_under_the_authors_keys(model, name, rename):
    """An independent reference. In training mode, so that batch norm and dropout act."""
    torch.manual_seed(0)
    ours, theirs = model(), torchvisions(name)
    state = ours.state_dict()
    names = {key: rename(key) for key in theirs.state_dict()}
    assert sorted(names.values()) == sorted(state)
    theirs.load_state_dict({key: state[name] for key, name in names.items()}, assign=True)  # checks the shapes
    if model is DenseNet121:  # torchvision puts the new features after the old: see the test of `Bottleneck`
        return
    x = torch.randn(4, 3, 32, 32)
    with torch.random.fork_rng():
        expected = theirs(x)
    torch.testing.assert_close(ours(x), expected)


def test_resnet_without_pooling_differs_in_its_linear_layer_only(meta):
    expected = shapes(ResNet18()) | linear_shapes("linear", 10, 512 * 32 * 32)
    assert shapes(ResNet18(pooling=False)) == expected


@pytest.mark.parametrize(
    ("model", "size"),
    [(model, size) for model in IMAGE_MODELS for size in (32, 75)]
    + [(partial(model, pooling=False), size) for model in (LeNet, ResNet18) for size in (20, 32)]
    + [(LeNet, 16), (partial(LeNet, pooling=False), 9)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_have_one_row_per_image(meta, model, size, channels):
    assert model(channels, 7, image_size=size)(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("model", [*IMAGE_MODELS, lambda *args: LogReg(3072, 10)])
def test_memory_format_does_not_change_the_output(model):
    torch.manual_seed(0)
    model = model(3, 10).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", [True, False])
def test_lenet_is_its_formula(pooling):
    """As a plain sequence of layers; the pools are left out for the ablation."""
    torch.manual_seed(0)
    net = LeNet(pooling=pooling)
    pool = nn.MaxPool2d(2) if pooling else nn.Identity()
    layers = [net.conv1, nn.ReLU(), pool, net.conv2, nn.ReLU(), pool, nn.Flatten()]
    layers += [net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), nn.Sequential(*layers)(x))


def test_densenet_puts_new_features_before_the_old():
    torch.manual_seed(0)
    block = Bottleneck(5, growth=3)
    x = torch.randn(2, 5, 4, 4)
    out = block(x)
    assert out.shape == (2, 8, 4, 4)
    assert torch.equal(out[:, 3:], x)
    new = F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), block.conv1.weight)
    new = F.conv2d(F.relu(F.batch_norm(new, None, None, training=True)), block.conv2.weight, padding=1)
    torch.testing.assert_close(out[:, :3], new)


def test_densenet_transition_pools_after_the_convolution():
    torch.manual_seed(0)
    transition = Transition(6, 3)
    x = torch.randn(2, 6, 4, 4)
    expected = F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), transition.conv.weight)
    torch.testing.assert_close(transition(x), F.avg_pool2d(expected, 2))


def test_vgg_initialisation():
    """Convolutions N(0, 2/(k²·out)) with bias 0; linear layers as PyTorch has them, U(±1/√in)."""
    torch.manual_seed(0)
    net = VGG11_bn(1, 2)
    for layer in net.features:
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (9 * layer.out_channels))
            n = layer.weight.numel()
            assert abs(layer.weight.std().item() / std - 1) < 5 / math.sqrt(2 * n)
            assert abs(layer.weight.mean().item()) < 5 * std / math.sqrt(n)
            assert not layer.bias.any()
    # Normal, not uniform: the fourth moment of a normal variable is 3σ⁴, of a uniform one 1.8σ⁴.
    weight = net.features[-4].weight
    assert ((weight**4).mean() / (weight**2).mean() ** 2).item() == pytest.approx(3, rel=0.02)
    hidden = net.classifier[3].weight
    assert hidden.abs().max().item() == pytest.approx(1 / math.sqrt(512), rel=1e-3)


def test_logreg_is_one_linear_layer_with_pytorchs_default_initialisation():
    assert shapes(LogReg()) == linear_shapes("output_fc", 10, 1024)
    torch.manual_seed(0)
    weight = LogReg(1024, 100).output_fc.weight
    assert weight.abs().max().item() == pytest.approx(1 / 32, rel=1e-3)
    assert weight.std().item() == pytest.approx(1 / (32 * math.sqrt(3)), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "arch"),
    list(zip([LogReg, VGG11_bn, *IMAGE_MODELS], PAPER_NAMES, strict=True)),
)
def test_paper_names(meta, kind, arch):
    """Also: a model is built on the device of the context, whole."""
    model = build_model(arch, num_channels=1, num_classes=2)
    assert type(model) is kind
    assert model(torch.zeros(3, 1, 32, 32)).shape == (3, 2)
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])


@given(st.sampled_from(sorted(ARCHITECTURES)), st.data())
def test_case_and_punctuation_are_forgiven(name, data):
    filler = st.text(" -_.()/", max_size=2)
    written = "".join(data.draw(filler) + data.draw(st.sampled_from([c, c.upper()])) for c in name)
    assert canonical_name(written + data.draw(filler)) == name


def test_names_become_parts_of_a_path():
    assert paper_name("ResNet-18") == "ResNet18"
    assert paper_name("torchvision:resnet18") == "torchvision-resnet18"
    assert paper_name("my.nets:Net_2") == "my.nets-Net_2"
    assert canonical_name("torchvision:ResNet18") == "torchvision:resnet18" and canonical_name("A:B") == "A:B"
    assert [canonical_name(paper_name(arch)) for arch in ARCHITECTURES] == list(ARCHITECTURES)


def test_an_edited_network_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    (tmp_path / "named_here.py").write_text("from defined_there import net")
    (tmp_path / "defined_there.py").write_text("def net(): pass")
    before, found = identity("named_here:net"), {identity("named_here:net")}
    for edited in ("named_here.py", "defined_there.py"):
        (tmp_path / edited).write_text("# edited")
        found.add(identity("named_here:net"))
    assert before in found and len(found) == 3 and before.startswith("named_here:net (")
    assert [identity(arch) for arch in ("ResNet-18", "torchvision:vgg11")] == ["resnet18", "torchvision:vgg11"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(arch="resnet81"), r"unknown architecture 'resnet81': did you mean resnet18"),
        (dict(arch="zzz"), r"unknown architecture 'zzz' \(known: logreg, lenet,"),
        (dict(arch="vgg11", pooling=False), r"vgg11 does not accept pooling=False \(lenet and resnet18 do\)"),
        (dict(arch="torchvision:resnet18", pooling=False), "torchvision:resnet18 does not accept pool"),
        (dict(num_channels=0), "num_channels=0 must be a positive integer"),
        (dict(image_size=(32, 32)), r"image_size=\(32, 32\) must be a positive integer"),
        (dict(image_size=15), "LeNet needs images of at least 16x16, got image_size=15"),
        (dict(image_size=8, pooling=False), "LeNet without pooling needs images of at least 9x9"),
        (dict(arch="vgg11", image_size=31), "VGG-11 needs images of at least 32x32, got image_size=31"),
        (dict(arch="densenet121", image_size=28), "DenseNet-121 needs images of at least 32x32, got"),
        (dict(arch="torchvision:resnet19"), "no classification model 'resnet19': did you mean .*resnet1"),
        (dict(arch="torchvision:fcn_resnet50"), "no classification model"),
        (dict(arch="torchvision:inception_v3"), "the network does not take 1x32x32 images: .*Calculated"),
        (dict(arch="torchvision:vit_b_16", image_size=40), "the network does not take 40x40 images: Input shape"),
        (dict(arch="no_such_package.nets:net"), "cannot import 'no_such_package.nets' .*ModuleNotFoundErr"),
    ],
)
def test_bad_requests_are_answered_in_one_line(meta, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        build_model(**({"arch": "lenet", "num_channels": 1, "num_classes": 2} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "googlenet", "vit_b_16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_torchvision_models_take_the_channels_and_the_size(meta, name, channels):
    model = build_model(f"torchvision:{name}", channels, 2, image_size=48)
    assert model(torch.zeros(2, channels, 48, 48)).shape == (2, 2)
    assert not torch.nn.modules.module._global_module_registration_hooks  # none is left behind


def test_torchvisions_own_initialisation_covers_the_adapted_convolution():
    """Its variance is 2/(k²·out) for ResNet, whatever the input channels, but goes by them for SqueezeNet."""
    torch.manual_seed(0)
    resnet = build_model("torchvision:resnet18", 1, 2).conv1.weight
    assert resnet.shape == (64, 1, 7, 7)
    assert resnet.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.05)
    squeezenet = build_model("torchvision:squeezenet1_1", 1, 2).features[0].weight
    assert squeezenet.abs().max().item() == pytest.approx(math.sqrt(6 / 9), rel=0.02)  # U(±√(6/(k²·in)))


@pytest.mark.parametrize("arch", ["vgg11", "torchvision:shufflenet_v2_x0_5"])
def test_the_blank_image_leaves_statistics_random_state_and_mode(arch):
    """The factory alone, from the same seed, gives the same network. VGG-11 has dropout and batch norm."""
    torchvision = pytest.importorskip("torchvision")
    plain = VGG11_bn if arch == "vgg11" else partial(torchvision.models.shufflenet_v2_x0_5, weights=None)
    torch.manual_seed(0)
    expected, random_state = plain(num_classes=2).state_dict(), torch.get_rng_state()
    torch.manual_seed(0)
    model = build_model(arch, 3, 2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's in the working directory, which is not on the import path."""
    (tmp_path / "nets_of_the_user.py").write_text(
        "from torch import nn\n"
        "def flat(num_classes, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, num_classes)).eval()\n"
        "def everything(**arguments):\n"
        "    net = flat(2, 8); net.arguments = arguments; return net\n"
        "def nothing(): return flat(10, 8)\n"
        "def one_value(image_size): return flat(1, image_size)\n"
        "def an_image(): return nn.Conv2d(1, 2, 1)\n"
        "class Pair(nn.Linear):\n"
        "    def __init__(self): super().__init__(8, 2)\n"
        "    def forward(self, x): return super().forward(x), x\n"
        "def parameterless(): return nn.Identity()\n"
        "def needs_more(num_classes, depth): return nn.Identity()\n"
        "def no_module(): return 3\n"
        "number = 3\n"
    )
    (tmp_path / "broken_nets_of_the_user.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    return "nets_of_the_user"


def test_a_users_factory_gets_the_arguments_it_accepts(user_module):
    net = build_model(f"{user_module}:flat", 1, 2, image_size=8)
    assert net[1].weight.shape == (2, 64) and net.training
    net = build_model(f"{user_module}:everything", 1, 2, image_size=8, pooling=False)
    assert net.arguments == {"num_channels": 1, "num_classes": 2, "image_size": 8, "pooling": False}
    assert build_model(f"{user_module}:nothing", 1, 2, image_size=8)[1].out_features == 10  # more do no harm


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("nets_of_the_user:everythin", "has no function or class 'everythin': did you mean everything"),
        ("nets_of_the_user:number", "has no function or class 'number'$"),
        ("nets_of_the_user:no_module", "no_module returned a int; expected a torch.nn.Module"),
        ("nets_of_the_user:needs_more", "be called with num_classes: missing a required argument: 'depth'"),
        ("nets_of_the_user:parameterless", "a Identity without parameters has nothing to draw or to train"),
        ("nets_of_the_user:one_value", r"one_value gives \(1, 1\) for one image: expected \(1, 2\), a value for each"),
        ("nets_of_the_user:an_image", r"an_image gives \(1, 2, 8, 8\) for one image: expected \(1, 2\)"),
        ("nets_of_the_user:Pair", r"Pair gives tuple for one image: expected \(1, 2\)"),
        ("broken_nets_of_the_user:net", "cannot import 'broken_nets_of_the_user' of .*ZeroDivisionError"),
    ],
)
def test_a_users_factory_that_does_not_fit(user_module, arch, words):
    with pytest.raises(ValueError, match=words):
        build_model(arch, 1, 2, 8)
