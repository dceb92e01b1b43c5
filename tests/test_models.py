"""The architectures: shapes, state-dict keys, initial weights; and the names that the registry knows."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import (
    VGG11,
    DenseNet121,
    LeNet,
    LogReg,
    ResNet18,
    TransformLayer,
    VGG11_bn,
    build_model,
    canonical_name,
    paper_name,
)
from models.densenet import Bottleneck, Transition
from models.registry import ARCHITECTURES

IMAGE_MODELS = [LeNet, VGG11, VGG11_bn, ResNet18, DenseNet121]


def conv(name, out_channels, in_channels, k, bias=False):
    shapes = {f"{name}.weight": (out_channels, in_channels, k, k)}
    return shapes | ({f"{name}.bias": (out_channels,)} if bias else {})


def linear(name, out_features, in_features):
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def norm(name, channels):
    shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def lenet_shapes(features):
    return (
        conv("conv1", 6, 3, 5, bias=True)
        | conv("conv2", 16, 6, 5, bias=True)
        | linear("fc1", 120, features)
        | linear("fc2", 84, 120)
        | linear("fc3", 10, 84)
    )


def vgg_shapes(positions):
    """Expect convolutions at these positions of `features`, each with a batch norm if there is room."""
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    shapes = {}
    for i, n in enumerate(positions):
        shapes |= conv(f"features.{n}", widths[i + 1], widths[i], 3, bias=True)
        if positions[1] == 4:  # conv, bn, ReLU, max-pool, conv
            shapes |= norm(f"features.{n + 1}", widths[i + 1])
    shapes |= linear("classifier.0", 512, 512) | linear("classifier.3", 512, 512)
    return shapes | linear("classifier.6", 10, 512)


def resnet_shapes(features):
    shapes = conv("conv1", 64, 3, 3) | norm("bn1", 64)
    in_channels = 64
    for layer, channels in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            shapes |= conv(f"{name}.conv1", channels, in_channels, 3) | norm(f"{name}.bn1", channels)
            shapes |= conv(f"{name}.conv2", channels, channels, 3) | norm(f"{name}.bn2", channels)
            if in_channels != channels:
                shapes |= conv(f"{name}.shortcut.0", channels, in_channels, 1)
                shapes |= norm(f"{name}.shortcut.1", channels)
            in_channels = channels
    return shapes | linear("linear", 10, features)


def densenet_shapes():
    shapes = conv("conv1", 64, 3, 3)
    channels = 64
    for stage, depth in enumerate((6, 12, 24, 16), start=1):
        for block in range(depth):
            name = f"dense{stage}.{block}"
            shapes |= norm(f"{name}.bn1", channels) | conv(f"{name}.conv1", 128, channels, 1)
            shapes |= norm(f"{name}.bn2", 128) | conv(f"{name}.conv2", 32, 128, 3)
            channels += 32
        if stage < 4:
            shapes |= norm(f"trans{stage}.bn", channels)
            shapes |= conv(f"trans{stage}.conv", channels // 2, channels, 1)
            channels //= 2
    return shapes | norm("bn", 1024) | linear("linear", 10, 1024)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def meta():
    """Shapes without arithmetic. Also shows that a model is built on the device of the context, whole."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: LogReg(1024, 2), linear("output_fc", 2, 1024)),
        (LeNet, lenet_shapes(16 * 5 * 5)),
        (lambda: LeNet(pooling=False), lenet_shapes(16 * 24 * 24)),
        (VGG11, vgg_shapes([0, 3, 6, 8, 11, 13, 16, 18])),
        (VGG11_bn, vgg_shapes([0, 4, 8, 11, 15, 18, 22, 25])),
        (ResNet18, resnet_shapes(512)),
        (lambda: ResNet18(pooling=False), resnet_shapes(512 * 32 * 32)),
        (DenseNet121, densenet_shapes()),
    ],
    ids=["logreg", "lenet", "lenet-nopool", "vgg11", "vgg11bn", "resnet18", "resnet18-nopool", "densenet121"],
)
def test_state_dict_has_the_authors_keys_and_shapes(meta, build, expected):
    model = build()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])


def test_vgg_features_end_with_an_average_pool_after_the_last_max_pool(meta):
    kinds = [type(module).__name__ for module in VGG11_bn().features]
    group = ["Conv2d", "BatchNorm2d", "ReLU"]
    one, two = [*group, "MaxPool2d"], [*group, *group, "MaxPool2d"]
    assert kinds == [*one, *one, *two, *two, *two, "AvgPool2d"]
    kinds = [type(module).__name__ for module in VGG11_bn().classifier]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]


@pytest.mark.parametrize("model", IMAGE_MODELS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 75])
def test_outputs_have_a_row_an_image(meta, model, channels, size):
    assert model(channels, 7, image_size=size)(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("model", [LeNet, ResNet18])
@pytest.mark.parametrize("size", [20, 32])
def test_outputs_without_pooling(meta, model, size):
    assert model(1, 2, image_size=size, pooling=False)(torch.zeros(2, 1, size, size)).shape == (2, 2)


def test_resnet_without_pooling_keeps_every_position(meta):
    shapes = []
    model = ResNet18(pooling=False)
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    assert shapes == [(64, 32, 32), (128, 32, 32), (256, 32, 32), (512, 32, 32)]


@pytest.mark.parametrize("model", [*IMAGE_MODELS, lambda *args: LogReg(3072, 10)])
def test_memory_format_does_not_change_the_output(model):
    torch.manual_seed(0)
    model = model(3, 10).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


def test_lenet_is_its_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for pooling in (True, False):
        net = LeNet(pooling=pooling)
        out = x
        for layer in (net.conv1, net.conv2):
            out = F.relu(layer(out))
            out = F.max_pool2d(out, 2) if pooling else out
        out = net.fc3(F.relu(net.fc2(F.relu(net.fc1(out.reshape(2, -1))))))
        assert torch.equal(net(x), out)


def test_resnet_agrees_with_torchvision():
    """An independent reference, once it has this stem. In training mode the batch norms act."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    ours = ResNet18()
    theirs = torchvision.models.resnet18(weights=None, num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    state = ours.state_dict()
    theirs.load_state_dict({k.replace("shortcut", "downsample").replace("linear", "fc"): state[k] for k in state})
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("model", "name"), [(VGG11, "vgg11"), (VGG11_bn, "vgg11_bn")])
def test_vgg_features_agree_with_torchvision(model, name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    ours = model().features
    theirs = torchvision.models.get_model(name, weights=None, init_weights=False).features
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_densenet_has_torchvisions_parameters_but_for_the_stem(meta):
    torchvision = pytest.importorskip("torchvision")

    def count(model):
        return sum(p.numel() for p in model.parameters())

    # Theirs: a 7×7 stem with batch norm. Ours: a 3×3 stem without.
    stems = 64 * 3 * (7 * 7 - 3 * 3) + 2 * 64
    assert count(torchvision.models.densenet121(weights=None, num_classes=10)) - count(DenseNet121()) == stems


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


@pytest.mark.parametrize("model", [VGG11, VGG11_bn])
def test_vgg_initialisation(model):
    """Convolutions N(0, 2/(k²·out)) with bias 0; linear layers as PyTorch has them, U(±1/√in)."""
    torch.manual_seed(0)
    net = model(1, 2)
    for layer in net.features:
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (9 * layer.out_channels))
            n = layer.weight.numel()
            assert abs(layer.weight.std().item() / std - 1) < 5 / math.sqrt(2 * n)
            assert abs(layer.weight.mean().item()) < 5 * std / math.sqrt(n)
            assert not layer.bias.any()
    # Normal, not uniform: the fourth moment of a normal variable is 3σ⁴, of a uniform one 1.8σ⁴.
    weight = net.features[-4 if model is VGG11 else -5].weight
    assert ((weight**4).mean() / (weight**2).mean() ** 2).item() == pytest.approx(3, rel=0.02)
    hidden = net.classifier[3].weight
    assert hidden.abs().max().item() == pytest.approx(1 / math.sqrt(512), rel=1e-3)


def test_logreg_initialisation_is_pytorchs_default():
    torch.manual_seed(0)
    weight = LogReg(1024, 100).output_fc.weight
    assert weight.abs().max().item() == pytest.approx(1 / 32, rel=1e-3)
    assert weight.std().item() == pytest.approx(1 / (32 * math.sqrt(3)), rel=0.02)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LeNet(image_size=15), "LeNet needs images of at least 16x16, got image_size=15"),
        (lambda: LeNet(image_size=8, pooling=False), "LeNet without pooling needs images of at least 9x9"),
        (lambda: VGG11_bn(image_size=31), "VGG-11 needs images of at least 32x32, got image_size=31"),
        (lambda: DenseNet121(image_size=28), "DenseNet-121 needs images of at least 32x32, got"),
    ],
)
def test_too_small_images_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_the_smallest_lenets_run(meta):
    assert LeNet(image_size=16)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    assert LeNet(image_size=9, pooling=False)(torch.zeros(1, 3, 9, 9)).shape == (1, 10)


def test_transform_layer():
    x = torch.randn(2, 3, 4, 5)
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    out = TransformLayer(mean, std)(x)
    for c in range(3):
        torch.testing.assert_close(out[:, c], (x[:, c] - mean[c]) / std[c])
    torch.testing.assert_close(TransformLayer(0.5, 2.0)(x), (x - 0.5) / 2)
    assert torch.equal(TransformLayer(0, 1)(x), x)


def test_transform_layer_keeps_the_state_dict_of_its_network_and_the_memory_format():
    layer = TransformLayer((0.1, 0.2, 0.3), 1.0)
    assert not layer.state_dict() and not list(layer.parameters())
    assert {name for name, _ in layer.named_buffers()} == {"mean", "std"}
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        (0.0, 0.0, "std=0.0 must be positive"),
        (0, (1.0, -1.0), "positive"),
        ((0, 0), (1, 1, 1), "2 channels and std 3"),
    ],
)
def test_transform_layer_refuses(mean, std, words):
    with pytest.raises(ValueError, match=words):
        TransformLayer(mean, std)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("logreg", LogReg),
        ("LogReg", LogReg),
        ("LeNet", LeNet),
        ("vgg11", VGG11_bn),
        ("VGG-11", VGG11_bn),
        ("VGG11_bn", VGG11_bn),
        ("vgg11 (bn)", VGG11_bn),
        ("VGG-11 plain", VGG11),
        ("ResNet-18", ResNet18),
        ("Dense Net 121", DenseNet121),
    ],
)
def test_paper_names(meta, arch, kind):
    model = build_model(arch, num_channels=1, num_classes=2)
    assert type(model) is kind
    assert model(torch.zeros(3, 1, 32, 32)).shape == (3, 2)


@given(st.sampled_from(sorted(ARCHITECTURES)), st.data())
def test_case_and_punctuation_are_forgiven(name, data):
    filler = st.text(" -_.()/", max_size=2)
    written = "".join(data.draw(filler) + data.draw(st.sampled_from([c, c.upper()])) for c in name)
    assert canonical_name(written + data.draw(filler)) == name


def test_names_become_parts_of_a_path():
    assert paper_name("ResNet-18") == "ResNet18"
    assert paper_name("torchvision:resnet18") == "torchvision-resnet18"
    assert paper_name("my.nets:Net_2") == "my.nets-Net_2"
    assert [canonical_name(paper_name(arch)) for arch in ARCHITECTURES] == list(ARCHITECTURES)


def test_the_same_seed_builds_the_same_network():
    def build():
        torch.manual_seed(3)
        return build_model("lenet", 1, 2, pooling=False)

    first, second = build(), build()
    assert first.fc1.in_features == 16 * 24 * 24
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(arch="resnet81"), r"unknown architecture 'resnet81': did you mean resnet18"),
        (dict(arch="zzz"), r"unknown architecture 'zzz' \(known: logreg, lenet,"),
        (dict(arch=""), "unknown architecture ''"),
        (dict(arch="vgg11", pooling=False), r"vgg11 does not accept pooling=False \(lenet and resnet18 do\)"),
        (dict(arch="logreg", pooling=False), "logreg does not accept pooling=False"),
        (dict(arch="torchvision:resnet18", pooling=False), "torchvision:resnet18 does not accept pool"),
        (dict(arch="lenet", num_channels=0), "num_channels=0 must be a positive integer"),
        (dict(arch="lenet", num_classes=-1), "num_classes=-1 must be a positive integer"),
        (dict(arch="lenet", image_size=(32, 32)), r"image_size=\(32, 32\) must be a positive integer"),
        (dict(arch="lenet", image_size=8), "image_size=8"),
        (dict(arch="torchvision:resnet19"), "no classification model 'resnet19': did you mean .*resnet1"),
        (dict(arch="torchvision:fcn_resnet50"), "no classification model"),
        (dict(arch="torchvision:inception_v3"), "inception_v3 does not take 1x32x32 images: Calculated"),
        (dict(arch="no_such_package.nets:net"), "cannot import 'no_such_package.nets' .*ModuleNotFoundErr"),
        (dict(arch=":net"), "cannot import ''"),
    ],
)
def test_bad_requests_are_answered_in_one_line(meta, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        build_model(**({"num_channels": 1, "num_classes": 2} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "googlenet"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_torchvision_models_take_the_channels(meta, name, channels):
    model = build_model(f"torchvision:{name}", channels, 2)
    assert model.training
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 2)
    hooks = torch.nn.modules.module._global_module_registration_hooks
    assert not hooks  # none is left behind


def test_torchvision_transformer_takes_the_size(meta):
    model = build_model("torchvision:vit_b_16", 1, 2, image_size=48)
    assert model(torch.zeros(1, 1, 48, 48)).shape == (1, 2)


def test_torchvisions_own_initialisation_covers_the_adapted_convolution():
    """Its variance is 2/(k²·out) for ResNet, whatever the input channels, but goes by them for SqueezeNet."""
    torch.manual_seed(0)
    resnet = build_model("torchvision:resnet18", 1, 2).conv1.weight
    assert resnet.shape == (64, 1, 7, 7)
    assert resnet.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.05)
    squeezenet = build_model("torchvision:squeezenet1_1", 1, 2).features[0].weight
    assert squeezenet.abs().max().item() == pytest.approx(math.sqrt(6 / 9), rel=0.02)  # U(±√(6/(k²·in)))


def test_the_check_of_the_size_leaves_statistics_and_random_state():
    def build(factory):
        torch.manual_seed(0)
        return factory(), torch.get_rng_state()

    torchvision = pytest.importorskip("torchvision")
    ours, our_state = build(lambda: build_model("torchvision:shufflenet_v2_x0_5", 3, 2))
    plain, plain_state = build(lambda: torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=2))
    assert torch.equal(our_state, plain_state)
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's in the working directory, which is not on the import path."""
    (tmp_path / "nets_of_the_user.py").write_text(
        "from torch import nn\n"
        "class Tiny(nn.Sequential):\n"
        "    def __init__(self, num_classes, image_size):\n"
        "        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes)); self.image_size = image_size\n"
        "def everything(**arguments):\n"
        "    net = nn.Identity(); net.arguments = arguments; return net\n"
        "def nothing(): return nn.Identity()\n"
        "def needs_more(num_classes, depth): return nn.Identity()\n"
        "def no_module(): return 3\n"
        "number = 3\n"
    )
    (tmp_path / "broken_nets_of_the_user.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    return "nets_of_the_user"


def test_a_users_factory_gets_the_arguments_it_accepts(user_module):
    net = build_model(f"{user_module}:Tiny", 1, 2, image_size=8)
    assert net.image_size == 8 and net[1].out_features == 2
    net = build_model(f"{user_module}:everything", 1, 2, image_size=8, pooling=False)
    assert net.arguments == {"num_channels": 1, "num_classes": 2, "image_size": 8, "pooling": False}
    assert isinstance(build_model(f"{user_module}:nothing", 1, 2), nn.Identity)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("everythin", "has no 'everythin': did you mean everything"),
        ("number", "nets_of_the_user:number is a int; expected a callable"),
        ("no_module", "nets_of_the_user:no_module returned a int; expected a torch.nn.Module"),
        ("needs_more", "needs_more cannot be called with num_classes: missing a required argument: 'depth'"),
    ],
)
def test_a_users_factory_that_does_not_fit(user_module, factory, words):
    with pytest.raises(ValueError, match=words):
        build_model(f"{user_module}:{factory}", 1, 2)


def test_a_users_factory_without_the_ablation_and_a_broken_module(user_module):
    with pytest.raises(ValueError, match="nothing does not accept pooling=False"):
        build_model(f"{user_module}:nothing", 1, 2, pooling=False)
    with pytest.raises(ValueError, match=r"cannot import 'broken_nets_of_the_user' of .*ZeroDivisionError"):
        build_model(f"broken_{user_module}:net", 1, 2)
