"""Names to architectures: the paper's, torchvision's and the user's own."""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from models.densenet import DenseNet121
from models.lenet import LeNet
from models.logreg import LogReg
from models.resnet import ResNet18
from models.vgg import VGG11, VGG11_bn


def _logreg(num_channels: int, num_classes: int, image_size: int) -> LogReg:
    return LogReg(num_channels * image_size * image_size, num_classes)


# Canonical name -> factory. The paper's VGG-11 has batch norm; vgg11plain is the one without.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "logreg": _logreg,
    "lenet": LeNet,
    "vgg11": VGG11_bn,
    "vgg11plain": VGG11,
    "resnet18": ResNet18,
    "densenet121": DenseNet121,
}
ALIASES = {"vgg11bn": "vgg11"}
PAPER_NAMES = {
    "logreg": "LogReg",
    "lenet": "LeNet",
    "vgg11": "VGG11",
    "vgg11plain": "VGG11plain",
    "resnet18": "ResNet18",
    "densenet121": "DenseNet121",
}


def canonical_name(arch: str) -> str:
    """Return the key of `ARCHITECTURES` that a name means: "ResNet-18" gives "resnet18".

    `torchvision:NAME` and `package.module:factory` come back as they are, unchecked.

    Raises:
        ValueError: the name is unknown.
    """
    if ":" in arch:
        return arch
    key = re.sub(r"[\W_]+", "", arch.lower())
    key = ALIASES.get(key, key)
    if key not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {arch!r}{_near(key, ARCHITECTURES)} "
            f"(known: {', '.join(ARCHITECTURES)}, torchvision:NAME, package.module:factory)"
        )
    return key


def paper_name(arch: str) -> str:
    """Return the name for titles and files: "ResNet18", or for the other forms "torchvision-resnet50"."""
    key = canonical_name(arch)
    return PAPER_NAMES.get(key, re.sub(r"[^\w.]+", "-", key))


def build_model(
    arch: str, num_channels: int, num_classes: int, image_size: int = 32, pooling: bool = True
) -> nn.Module:
    """Build a freshly initialised network, in training mode, that maps (N, C, S, S) to (N, num_classes).

    Args:
        arch: one of three forms.
            A paper name (`logreg lenet vgg11 vgg11plain resnet18 densenet121`), case and punctuation
            forgiven. `vgg11` is the one with batch norm, `vgg11plain` the one without.
            `torchvision:NAME`, a classification model of torchvision, untrained. For other than 3 channels
            its first convolution is exchanged before the model initialises it, in the model's own way.
            `package.module:factory`, found on the import path or in the working directory, and called with
            those of the four arguments below that it accepts, by name.
        num_channels: channels C of the images.
        num_classes: number of outputs.
        image_size: height and width S of the images.
        pooling: False for the ablation without pooling, which `lenet` and `resnet18` have (and a factory that
            accepts the argument).

    Raises:
        ValueError: one of the arguments does not fit, said in one line. What a user's own factory raises
            passes through.
    """
    arguments = {"num_channels": num_channels, "num_classes": num_classes, "image_size": image_size}
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    arch = canonical_name(arch)
    if arch in ARCHITECTURES:
        factory = ARCHITECTURES[arch]
    elif arch.startswith("torchvision:"):
        factory = partial(_torchvision_model, arch.removeprefix("torchvision:"))
    else:
        factory = _import_factory(arch)
    model = _call_accepted(factory, arch, arguments | {"pooling": pooling})
    if not isinstance(model, nn.Module):
        raise ValueError(f"{arch} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _near(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f": did you mean {' or '.join(matches)}?" if matches else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _call_accepted(factory: Callable[..., nn.Module], arch: str, arguments: dict) -> nn.Module:
    """Call a factory with those of the arguments that its signature accepts by name."""
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        if "pooling" not in signature.parameters and not arguments["pooling"]:
            raise ValueError(f"{arch} does not accept pooling=False (lenet and resnet18 do)")
        arguments = {name: value for name, value in arguments.items() if name in signature.parameters}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "no arguments"
        raise ValueError(f"{arch} cannot be called with {given}: {error}") from error
    return factory(**arguments)


def _import_factory(arch: str) -> Callable[..., nn.Module]:
    """Import the factory that `package.module:factory` names."""
    module_name, _, attribute = arch.partition(":")
    # A script's own folder is on the path, not the one it is started from. This goes last, to shadow nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module can fail in any way
        raise ValueError(
            f"cannot import {module_name!r} of {arch!r}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise ValueError(f"module {module_name!r} has no {attribute!r}{_near(attribute, dir(module))} (from {arch!r})")
    if not callable(factory):
        raise ValueError(f"{arch} is a {type(factory).__name__}; expected a callable that returns a torch.nn.Module")
    return factory


def _torchvision_model(name: str, num_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Build an untrained classification model of torchvision, for (N, C, S, S) images."""
    import torchvision  # takes seconds, and only these architectures need it

    names = torchvision.models.list_models(module=torchvision.models)
    key = name.strip().lower()
    if key not in names:
        raise ValueError(f"torchvision has no classification model {name!r}{_near(key, names)}")
    options: dict = {"weights": None, "num_classes": num_classes}
    if key in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}  # one output; and no warning about the default
    elif key.startswith("vit_"):
        options["image_size"] = image_size
    elif key.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)

    replaced = num_channels == 3

    def adapt_first_conv(_parent: nn.Module, _name: str, module: nn.Module | None) -> nn.Module | None:
        nonlocal replaced
        if replaced or not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            return None
        replaced = True
        return nn.Conv2d(
            num_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
        )

    # Exchanged as the model is put together, not after: so the model's own initialisation, which differs from
    # one architecture to the next and may depend on the fan-in, draws the weights of this convolution too.
    hook = register_module_module_registration_hook(adapt_first_conv)
    try:
        model = torchvision.models.get_model(key, **options)
        _check_takes(model, num_channels, image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = f"{num_channels}x{image_size}x{image_size}"
        raise ValueError(f"torchvision:{key} does not take {size} images: {_first_line(error)}") from error
    finally:
        hook.remove()
    if not replaced:
        raise ValueError(f"torchvision:{key} has no convolution on 3 channels to adapt to num_channels={num_channels}")
    return model


@torch.no_grad()
def _check_takes(model: nn.Module, num_channels: int, image_size: int) -> None:
    """Run one blank image through; in eval mode, so that neither statistics nor the random state change."""
    device = next(model.parameters()).device
    model.eval()
    model(torch.zeros(1, num_channels, image_size, image_size, device=device))
    model.train()
