"""The architectures: shapes, state-dict keys, initial weights; and the names that the registry knows."""

import itertools
import math
import random
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import models
import utils.layout
from models import DenseNet121, LeNet, LogReg, ResNet18, VGG11_bn
from models.checks import check_fresh_draws, check_model, check_training_step
from models.densenet import Bottleneck, Transition
from models.registry import ARCHITECTURES, build_model, canonical_name, identity, paper_name
from refusals import Refusal
from tests import tiny_networks
from utils.layout import layout_of
from utils.seeding import default_generator

IMAGE_MODELS = [LeNet, VGG11_bn, ResNet18, DenseNet121]
PAPER_NAMES = ["LogReg", "vgg11 (bn)", "LeNet", "VGG-11", "ResNet-18", "Dense Net 121"]


@pytest.fixture
def meta():
    """Shapes without arithmetic."""
    with torch.device("meta"):
        yield


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def layer_shapes(name, *weight):
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


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


AUTHORS = [(VGG11_bn, "vgg11_bn", str), (ResNet18, "resnet18", the_authors), (DenseNet121, "densenet121", the_authors)]


@pytest.mark.parametrize(("model", "name", "rename"), AUTHORS)
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
    expected = shapes(ResNet18()) | layer_shapes("linear", 10, 512 * 32 * 32)
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


@pytest.mark.parametrize(("pooling", "side"), [(True, 5), (False, 24)])
def test_lenet_is_its_formula_under_the_authors_keys(pooling, side):
    """As a plain sequence of layers; the pools are left out for the ablation."""
    torch.manual_seed(0)
    net = LeNet(pooling=pooling)
    expected = layer_shapes("conv1", 6, 3, 5, 5) | layer_shapes("conv2", 16, 6, 5, 5)
    expected |= layer_shapes("fc1", 120, 16 * side**2) | layer_shapes("fc2", 84, 120) | layer_shapes("fc3", 10, 84)
    assert shapes(net) == expected
    pool = nn.MaxPool2d(2) if pooling else nn.Identity()
    layers = [net.conv1, nn.ReLU(), pool, net.conv2, nn.ReLU(), pool, nn.Flatten()]
    layers += [net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), nn.Sequential(*layers)(x))


def test_densenet_puts_new_features_before_the_old_and_pools_after_a_transition():
    torch.manual_seed(0)
    block, x = Bottleneck(5, growth=3), torch.randn(2, 5, 4, 4)
    out = block(x)
    assert out.shape == (2, 8, 4, 4)
    assert torch.equal(out[:, 3:], x)
    new = F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), block.conv1.weight)
    new = F.conv2d(F.relu(F.batch_norm(new, None, None, training=True)), block.conv2.weight, padding=1)
    torch.testing.assert_close(out[:, :3], new)
    transition, x = Transition(6, 3), torch.randn(2, 6, 4, 4)
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
    assert shapes(LogReg()) == layer_shapes("output_fc", 10, 1024)
    torch.manual_seed(0)
    weight = LogReg(1024, 100).output_fc.weight
    assert weight.abs().max().item() == pytest.approx(1 / 32, rel=1e-3)
    assert weight.std().item() == pytest.approx(1 / (32 * math.sqrt(3)), rel=0.02)


@pytest.mark.parametrize(("kind", "arch"), list(zip([LogReg, VGG11_bn, *IMAGE_MODELS], PAPER_NAMES, strict=True)))
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
    names = {"ResNet-18": "ResNet18", "torchvision:ResNet18": "torchvision-resnet18", "timm:a.b": "timm-a.b"}
    names |= {"my.nets:Net_2": "my.nets-Net_2", TinyOfLinear: "TinyOfLinear", (lambda: None): "network"}
    assert [paper_name(arch) for arch in names] == list(names.values())
    assert [canonical_name(paper_name(arch)) for arch in ARCHITECTURES] == list(ARCHITECTURES)


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
        (dict(arch="torchvision:inception_v3"), "the network does not take 1x32x32 images: Calculated"),
        (dict(arch="torchvision:vit_b_16", image_size=40), "the network does not take 40x40 images: Input shape"),
        (dict(arch="timm:resnet19"), "timm has no model 'resnet19': did you mean .*resnet1"),
        (dict(arch="timm:inception_v3"), "the network does not take 1x32x32 images: Calculated"),
        (dict(arch="no_such_package.nets:net"), "cannot import 'no_such_package.nets' .*: No module named 'no_such"),
        (dict(arch="math:sinn"), "module 'math' has no function or class 'sinn': did you mean sin"),
        (dict(arch="math:pi"), "module 'math' has no function or class 'pi'$"),
        (dict(arch=":net"), "':net' names no module: expected package.module:factory"),
        (dict(arch=lambda depth: None), "be called with no arguments: missing a required argument: 'depth'"),
        (dict(arch=lambda: 3), "network returned a int; expected a torch.nn.Module"),
        (dict(arch=nn.Linear(1024, 2)), "network is one network: name a class or function"),
        (dict(arch=nn.Identity), "a Identity without parameters has nothing to draw or to train"),
        (dict(arch=lambda: nn.Conv2d(1, 2, 1)), r"in evaluation mode .* returns a tensor \(1, 2, 32, 32\): expected"),
        (dict(arch=lambda: flat(1, 32)), r"returns a tensor \(1, 1\): expected one tensor \(1, 2\), a value for each"),
    ],
)
def test_bad_requests_are_answered_in_one_line(arguments, words):
    arguments = {"arch": "lenet", "num_channels": 1, "num_classes": 2, "image_size": 32} | arguments
    with pytest.raises(Refusal, match=words) as caught:
        check_model(build_model(**arguments), arguments["arch"], (1, *2 * [arguments["image_size"]]), 2)
    assert "\n" not in str(caught.value)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Refusal, match="timm:resnet18 needs timm: pip install timm"):
        build_model("timm:resnet18", 1, 2)


TORCHVISIONS = [f"torchvision:{name}" for name in ("resnet18", "shufflenet_v2_x0_5", "googlenet", "vit_b_16")]


@pytest.mark.parametrize("arch", [*TORCHVISIONS, "timm:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_libraries_models_take_the_channels_and_the_size(arch, channels):
    pytest.importorskip(arch.partition(":")[0])
    model = build_model(arch, channels, 2, image_size=48)
    check_model(model, arch, (channels, 48, 48), 2)
    assert identity(arch, model) == arch and all(module.training for module in model.modules())
    assert not torch.nn.modules.module._global_module_registration_hooks  # none is left behind


def test_torchvisions_own_initialisation_covers_the_adapted_convolution():
    """Its variance is 2/(k²·out) for ResNet, whatever the input channels, but goes by them for SqueezeNet."""
    torch.manual_seed(0)
    resnet = build_model("torchvision:resnet18", 1, 2).conv1.weight
    assert resnet.shape == (64, 1, 7, 7)
    assert resnet.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.05)
    squeezenet = build_model("torchvision:squeezenet1_1", 1, 2).features[0].weight
    assert squeezenet.abs().max().item() == pytest.approx(math.sqrt(6 / 9), rel=0.02)  # U(±√(6/(k²·in)))


# Networks of the user.


class TinyOfLinear(nn.Linear):
    """One linear layer on 8×8 images, whose outputs a test can change."""

    change = staticmethod(lambda module, output: output)

    def __init__(self):
        super().__init__(64, 2)

    def forward(self, x):
        """Map images (N, 1, 8, 8) to (N, 2)."""
        return self.change(self, super().forward(x.flatten(1)))


def flat(num_classes, image_size, *layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, num_classes), *layers).eval()


def changed(change):
    """A factory of linear networks whose outputs are changed."""
    return type("Changed", (TinyOfLinear,), {"change": staticmethod(change)})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's working directory, which is not on the import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("main_of_the_user", "nets_beside_no_models"):
        sys.modules.pop(name, None)


def test_a_factory_gets_the_arguments_it_accepts():
    assert build_model(flat, 1, 2, image_size=8)[1].weight.shape == (2, 64)
    assert build_model(lambda: flat(10, 8), 1, 2).training
    given = {}
    build_model(lambda **arguments: given.update(arguments) or flat(2, 8), 1, 2, image_size=8, pooling=False)
    assert given == {"num_channels": 1, "num_classes": 2, "image_size": 8, "pooling": False}


def test_what_a_users_network_raises_passes_through(folder):
    (folder / "broken_nets.py").write_text("import no_such_module")
    (folder / "broken_nets_too.py").write_text("1 / 0")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        build_model("broken_nets:net", 1, 2)
    with pytest.raises(ZeroDivisionError):
        build_model("broken_nets_too:net", 1, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        check_model(build_model(TinyOfLinear, 1, 2), TinyOfLinear, (1, 9, 9), 2)


NET = """from torch import nn
from {helpers} import Helper
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        from utils import WIDTH
        self.body, self.helper = nn.Linear(64, WIDTH), Helper()
    def forward(self, x):
        return self.helper(self.body(x.flatten(1)))
"""
HELPER = "from torch import nn\nWIDTH = 2\nclass Helper(nn.Module):\n    def forward(self, x):\n        return x\n"


@pytest.mark.parametrize("arch", ["models.nets:Net", "main_of_the_user:Net"])
def test_names_mean_the_working_directory_first_and_ours_again_afterwards(folder, arch):
    """The user has packages `models` and `utils`, the latter also imported by the constructor."""
    for path, text in {"models/nets.py": NET, "main_of_the_user.py": NET, "utils/__init__.py": HELPER}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text.format(helpers="utils"))
    ours = [models, models.registry, utils.layout]
    built = [build_model(arch, 1, 2) for _ in range(2)]
    assert type(built[0]) is type(built[1]) and "models.nets" not in sys.modules
    assert [sys.modules[module.__name__] for module in ours] == ours
    check_model(built[0], arch, (1, 8, 8), 2)
    assert layout_of(built[0]) is torch.contiguous_format
    before = identity(arch, built[0])
    with open("utils/__init__.py", "a") as file:
        file.write("# a comment elsewhere")
    assert identity(arch, built[0]) == before and before.startswith(f"{arch} (")
    (folder / "utils/__init__.py").write_text(HELPER.replace("return x", "return x.relu()"))
    assert identity(arch, built[0]) != before


def test_a_users_module_may_import_ours(folder):
    (folder / "nets_beside_no_models.py").write_text("from models import LeNet")
    assert type(build_model("nets_beside_no_models:LeNet", 1, 2)) is LeNet
    assert type(build_model("tests.tiny_networks:plain", 1, 2)) is tiny_networks.Tiny


def test_a_structure_is_part_of_the_identity_also_without_a_source():
    namespace = {"nn": nn}
    exec("class Typed(nn.Linear): pass", namespace)
    one, other = (identity("math:sin", namespace["Typed"](width, 1)) for width in (1, 2))
    assert one != other


def test_channels_last_is_for_our_networks_and_torchvisions():
    channels_last = [build_model(arch, 1, 2) for arch in ("lenet", "torchvision:squeezenet1_1")]
    assert [layout_of(model) for model in channels_last] == [torch.channels_last] * 2
    assert layout_of(flat(2, 8)) is layout_of(TinyOfLinear()) is torch.contiguous_format


# Checks before a run.


def from_numpy_and_python():
    model = TinyOfLinear()
    nn.init.constant_(model.weight, np.random.rand() + random.random())  # noqa: NPY002
    return model


def seeded_by_itself():
    torch.manual_seed(0)
    return TinyOfLinear()


ONE = TinyOfLinear()
NUMBERS = itertools.count()


def batch_norm():
    return flat(2, 8, nn.BatchNorm1d(2))


@pytest.mark.parametrize("build", [TinyOfLinear, from_numpy_and_python, batch_norm, tiny_networks.nan_trunk])
def test_sound_networks_pass_and_leave_the_generators_alone(build):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    with default_generator("cpu", 0):
        expected = draw()
    with default_generator("cpu", 0):
        check_fresh_draws(build, (1, 8, 8))
        if build is not tiny_networks.nan_trunk:
            check_training_step(build, (1, 8, 8), 2, last_batch=1 if build is TinyOfLinear else 2)
        with default_generator("cpu", 0):
            assert draw() == expected
        assert draw() == expected


def fresh(build):
    check_fresh_draws(build, (1, 8, 8))


def step(build):
    check_training_step(build, (1, 8, 8), 2, last_batch=1)


@pytest.mark.parametrize(
    ("check", "build", "words"),
    [
        (fresh, lambda: ONE, "two calls of the factory return the same network or share weights"),
        (fresh, lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 8, 8)), ONE), "or share weights"),
        (fresh, seeded_by_itself, "networks of two seeds are equal"),
        (fresh, changed(lambda _, output: output + torch.rand(())), "random in evaluation mode"),
        (
            fresh,
            lambda: nn.Sequential(TinyOfLinear(), nn.Linear(2, 2 + next(NUMBERS))),
            "two networks of one seed differ",
        ),
        (step, changed(lambda self, x: (x, x) if self.training else x), r"for 2 images in training .* a tuple: expect"),
        (step, changed(lambda self, x: {"out": x}), r"returns a dict: expected one tensor \(2, 2\)"),
        (step, changed(lambda self, x: x[:, :1]), r"returns a tensor \(2, 1\)"),
        (step, changed(lambda self, x: x.detach()), "cannot be trained: its output in training mode has no gradient"),
        (step, batch_norm, "last batch, which has one image: choose another --batch-size or --num-train"),
    ],
)
def test_networks_that_are_not_fresh_draws_or_cannot_take_a_training_step_are_refused(check, build, words):
    with pytest.raises(Refusal, match=words):
        check(build)
