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
    """Turn an exception into a refusal of one line. For networks that are not the user's: theirs keep the traceback."""
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
    does_not_take = refusing(f"the network does not take {image_size}x{image_size} images")
    with register_module_module_registration_hook(adapt_first_conv), does_not_take:
        return torchvision.models.get_model(name, **options)


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
