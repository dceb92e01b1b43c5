"""Names to networks: the paper's, torchvision's, timm's and the user's own."""

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from torch import nn

from models.densenet import DenseNet121
from models.lenet import LeNet
from models.libraries import LIBRARIES, near
from models.logreg import LogReg
from models.resnet import ResNet18
from models.users import digest, import_factory, users_imports
from models.vgg import VGG11_bn
from refusals import Refusal

Factory = Callable[..., nn.Module]

_FACTORIES: dict[str, Factory] = {  # by the paper's names; its VGG-11 has batch norm
    "LogReg": lambda num_channels, num_classes, image_size: LogReg(num_channels * image_size**2, num_classes),
    "LeNet": LeNet,
    "VGG11": VGG11_bn,
    "ResNet18": ResNet18,
    "DenseNet121": DenseNet121,
}
ARCHITECTURES = {name.lower(): factory for name, factory in _FACTORIES.items()}
PAPER_NAMES = {name.lower(): name for name in _FACTORIES}
ALIASES = {"vgg11bn": "vgg11"}


def canonical_name(arch: str | Factory) -> str:
    """The key of `ARCHITECTURES` that a name means ("ResNet-18": "resnet18"), or refuse it.

    Names with a colon come back unchecked, and a factory gives its own name.
    """
    if not isinstance(arch, str):
        return getattr(arch, "__name__", "network").replace("<lambda>", "network")
    if ":" in arch:
        return arch if is_users(arch) else arch.lower()
    key = re.sub(r"[\W_]+", "", arch.lower())
    key = ALIASES.get(key, key)
    if key not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *(f"{library}:NAME" for library in LIBRARIES), "package.module:factory"])
        raise Refusal(f"unknown architecture {arch!r}{near(key, ARCHITECTURES)} (known: {known})")
    return key


def paper_name(arch: str | Factory) -> str:
    """The name for titles and files: "ResNet18", or of another form "torchvision-resnet50"."""
    name = canonical_name(arch)
    return PAPER_NAMES[name] if _is_papers(arch) else re.sub(r"[^\w.]+", "-", name)


def identity(arch: str | Factory, model: nn.Module) -> str:
    """What a run's settings say of its network, here of the run's sizes: the name, and of a user's also a digest."""
    if not is_users(arch):
        return canonical_name(arch)
    with users_imports():
        return f"{canonical_name(arch)} ({digest(_factory(arch), model)})"


def is_users(arch: str | Factory) -> bool:
    """Whether the network is the user's: a factory, or `package.module:factory`."""
    return not _is_papers(arch) and (not isinstance(arch, str) or arch.partition(":")[0] not in LIBRARIES)


def build_model(
    arch: str | Factory, num_channels: int, num_classes: int, image_size: int = 32, pooling: bool = True
) -> nn.Module:
    """Build a freshly initialised network, in training mode, that maps (N, C, S, S) to (N, num_classes).

    `arch` is a paper name, case and punctuation forgiven; or `torchvision:NAME` or `timm:NAME`, an untrained
    classification model; or a user's factory, itself or as `package.module:factory`, in the working directory or on the
    import path. A factory is called with those of the arguments that it accepts, by name, and what it raises passes
    through. `pooling=False` is the ablation of `lenet` and `resnet18`. Other arguments that do not fit are refused.
    """
    sizes = {"num_channels": num_channels, "num_classes": num_classes, "image_size": image_size}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise Refusal(f"{name}={value!r} must be a positive integer")
    with users_imports() if is_users(arch) else nullcontext():
        factory = _factory(arch)
        model = factory(**_accepted(factory, canonical_name(arch), sizes | {"pooling": pooling}))
    if not isinstance(model, nn.Module):
        raise Refusal(f"{canonical_name(arch)} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model.train()


def _is_papers(arch: str | Factory) -> bool:
    return isinstance(arch, str) and ":" not in arch


def _factory(arch: str | Factory) -> Factory:
    if _is_papers(arch):
        return ARCHITECTURES[canonical_name(arch)]
    if not is_users(arch):
        library, _, name = canonical_name(arch).partition(":")
        return partial(LIBRARIES[library], name)
    factory = import_factory(arch) if isinstance(arch, str) else arch
    if isinstance(factory, nn.Module):
        raise Refusal(f"{canonical_name(arch)} is one network: name a class or function that builds one on each call")
    return factory


def _accepted(factory: Factory, arch: str, arguments: dict) -> dict:
    """Those of the arguments that a factory's signature accepts by name."""
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        if "pooling" not in signature.parameters and not arguments["pooling"]:
            raise Refusal(f"{arch} does not accept pooling=False (lenet and resnet18 do)")
        arguments = {name: value for name, value in arguments.items() if name in signature.parameters}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise Refusal(f"{arch} cannot be called with {', '.join(arguments) or 'no arguments'}: {error}") from None
    return arguments
