"""Names to architectures: the paper's, torchvision's and the user's own."""

import difflib
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from models.densenet import DenseNet121
from models.lenet import LeNet
from models.logreg import LogReg
from models.resnet import ResNet18
from models.vgg import VGG11_bn

# Paper's name -> factory. The paper's VGG-11 has batch norm.
_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "LogReg": lambda num_channels, num_classes, image_size: LogReg(num_channels * image_size**2, num_classes),
    "LeNet": LeNet,
    "VGG11": VGG11_bn,
    "ResNet18": ResNet18,
    "DenseNet121": DenseNet121,
}
ARCHITECTURES = {name.lower(): factory for name, factory in _FACTORIES.items()}
PAPER_NAMES = {name.lower(): name for name in _FACTORIES}
ALIASES = {"vgg11bn": "vgg11"}


def canonical_name(arch: str) -> str:
    """Return the key of `ARCHITECTURES` that a name means: "ResNet-18" gives "resnet18".

    `torchvision:NAME` and `package.module:factory` come back unchecked; any other unknown name is a ValueError.
    """
    if ":" in arch:
        return arch.lower() if arch.startswith("torchvision:") else arch
    key = re.sub(r"[\W_]+", "", arch.lower())
    key = ALIASES.get(key, key)
    if key not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, "torchvision:NAME", "package.module:factory"])
        raise ValueError(f"unknown architecture {arch!r}{_near(key, ARCHITECTURES)} (known: {known})")
    return key


def paper_name(arch: str) -> str:
    """Return the name for titles and files: "ResNet18", or for the other forms "torchvision-resnet50"."""
    key = canonical_name(arch)
    return PAPER_NAMES.get(key, re.sub(r"[^\w.]+", "-", key))


def identity(arch: str) -> str:
    """The canonical name, of a `package.module:factory` with a digest of its source: edited, it is another one."""
    arch = canonical_name(arch)
    if ":" not in arch or arch.startswith("torchvision:"):
        return arch
    names = {arch.partition(":")[0], getattr(_import_factory(arch), "__module__", "")}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(names)]
    source = b"".join(Path(file).read_bytes() for file in files if file)
    return f"{arch} ({hashlib.blake2b(source, digest_size=4).hexdigest()})"


def build_model(
    arch: str, num_channels: int, num_classes: int, image_size: int = 32, pooling: bool = True
) -> nn.Module:
    """Build a freshly initialised network, in training mode, that maps (N, C, S, S) to (N, num_classes).

    `arch` is a paper name, case and punctuation forgiven; or `torchvision:NAME`, an untrained classification model; or
    `package.module:factory`, found on the import path or in the working directory, and called with those of the
    arguments that it accepts, by name. `pooling=False` is the ablation, which `lenet` and `resnet18` have.

    ValueError if anything does not fit, said in one line. What a user's own factory raises passes through.
    """
    arguments = {"num_channels": num_channels, "num_classes": num_classes, "image_size": image_size}
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    arch = canonical_name(arch)
    if arch.startswith("torchvision:"):
        factory = partial(_torchvision_model, arch.removeprefix("torchvision:"))
    else:
        factory = ARCHITECTURES.get(arch) or _import_factory(arch)
    model = _call_accepted(factory, arch, arguments | {"pooling": pooling})
    if not isinstance(model, nn.Module):
        raise ValueError(f"{arch} returned a {type(model).__name__}; expected a torch.nn.Module")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"a {type(model).__name__} without parameters has nothing to draw or to train")
    blank = torch.zeros(1, num_channels, image_size, image_size, device=parameter.device)
    takes = f"the network does not take {num_channels}x{image_size}x{image_size} images"
    # In eval mode, so that neither the batch norms' statistics nor the random state change.
    with torch.no_grad(), _refusing(takes, RuntimeError, ValueError, AssertionError):
        output = model.eval()(blank)
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != 1 or output.shape[1] < num_classes:
        found = tuple(getattr(output, "shape", [])) or type(output).__name__
        raise ValueError(f"{arch} gives {found} for one image: expected (1, {num_classes}), a value for each class")
    return model.train()


def _near(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f": did you mean {' or '.join(matches)}?" if matches else ""


@contextmanager
def _refusing(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of these kinds into a ValueError of one line. Of `Exception`, the line also names the kind."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing about the network
        raise
    except kinds as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = f"{type(error).__name__}: " if Exception in kinds else ""
        raise ValueError(f"{what}: {kind}{line}") from error


def _call_accepted(factory: Callable[..., nn.Module], arch: str, arguments: dict) -> nn.Module:
    """Call a factory with those of the arguments that its signature accepts by name."""
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        if "pooling" not in signature.parameters and not arguments["pooling"]:
            raise ValueError(f"{arch} does not accept pooling=False (lenet and resnet18 do)")
        arguments = {name: value for name, value in arguments.items() if name in signature.parameters}
    with _refusing(f"{arch} cannot be called with {', '.join(arguments) or 'no arguments'}", TypeError):
        signature.bind(**arguments)
    return factory(**arguments)


def _import_factory(arch: str) -> Callable[..., nn.Module]:
    """Import the factory that `package.module:factory` names."""
    module_name, _, attribute = arch.partition(":")
    # A script's own folder is on the path, not the one it is started from. This goes last, to shadow nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with _refusing(f"cannot import {module_name!r} of {arch!r}", Exception):  # the user's module can fail in any way
        module = importlib.import_module(module_name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = _near(attribute, set(dir(module)) - {attribute})
        raise ValueError(f"module {module_name!r} has no function or class {attribute!r}{near}")
    return factory


def _torchvision_model(name: str, num_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Build an untrained classification model of torchvision, for (N, C, S, S) images."""
    import torchvision  # takes seconds, and only these architectures need it

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(f"torchvision has no classification model {name!r}{_near(name, names)}")
    options: dict = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}  # one output; and no warning about the default
    elif name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)

    def adapt_first_conv(_parent: nn.Module, _name: str, module: nn.Module | None) -> nn.Module | None:
        if num_channels == 3 or not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            return None
        same = ("out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
        return nn.Conv2d(num_channels, bias=module.bias is not None, **{key: getattr(module, key) for key in same})

    # Exchanged as the model is put together, not after: so the model's own initialisation, which differs from
    # one architecture to the next and may depend on the fan-in, draws the weights of this convolution too.
    refusing = _refusing(f"the network does not take {image_size}x{image_size} images", ValueError, AssertionError)
    with register_module_module_registration_hook(adapt_first_conv), refusing:
        return torchvision.models.get_model(name, **options)
