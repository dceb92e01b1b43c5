"""Untrained classification models of torchvision and timm, for (N, C, S, S) images."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from refusals import Refusal


def near(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known names that resemble it."""
    matches = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f": did you mean {' or '.join(matches)}?" if matches else ""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn an exception into a refusal of one line. Not for a user's network, which keeps its traceback."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):  # says nothing about the network
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{what}: {line}") from error


def torchvision_model(name: str, num_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Build a model of torchvision; its first convolution is made for these channels."""
    import torchvision  # takes seconds, and only these architectures need it

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise Refusal(f"torchvision has no classification model {name!r}{near(name, names)}")
    one_output = {"aux_logits": False, "init_weights": True}  # also without a warning about the default
    sizes = {"vit": {"image_size": image_size}, "maxvit": {"input_size": (image_size, image_size)}}
    options = (sizes | dict.fromkeys(["googlenet", "inception"], one_output)).get(name.partition("_")[0], {})

    def adapt_first_conv(_parent: nn.Module, _name: str, module: nn.Module | None) -> nn.Module | None:
        if num_channels == 3 or not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            return None
        same = ("out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
        return nn.Conv2d(num_channels, bias=module.bias is not None, **{key: getattr(module, key) for key in same})

    # Exchanged as the model is put together: its own initialisation, which may go by the fan-in, draws them too.
    hook = register_module_module_registration_hook(adapt_first_conv)
    with hook, refusing(f"the network does not take {image_size}x{image_size} images"):
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def timm_model(name: str, num_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Build a model of timm, for this image size if it depends on one."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise Refusal(f"timm:{name} needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise Refusal(f"timm has no model {name!r}{near(name, timm.list_models())}")
    options = {"pretrained": False, "in_chans": num_channels, "num_classes": num_classes}
    with refusing(f"timm does not build {name} for {num_channels}x{image_size}x{image_size} images"):
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
        return timm.create_model(name, **options)  # takes any size


LIBRARIES = {"torchvision": torchvision_model, "timm": timm_model}
