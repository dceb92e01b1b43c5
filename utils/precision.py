"""The arithmetic of a forward and backward pass: fp32, tf32 or bf16; and CUDA graphs, which repeat a pass."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import autograd, backends, nn

from refusals import Refusal
from utils.layout import comes_from, layout_of

PRECISIONS = ("fp32", "tf32", "bf16")


def default(device: torch.device) -> str:
    """The precision of a training unless one is chosen: tf32 on a GPU that has it (Ampere or newer), else fp32."""
    return "tf32" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def set_fp32(precision: str, device: torch.device | str) -> None:
    """Let products and convolutions of fp32 numbers be rounded to TF32, or not, in this process from now on.

    torch lets cuDNN round convolutions unless told otherwise: "fp32" and "bf16" tell it.

    Raises:
        Refusal: no such precision, or tf32 without a GPU.
    """
    if precision not in PRECISIONS:
        raise Refusal(f"precision {precision!r} is unknown: expected one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and torch.device(device).type != "cuda":
        raise Refusal(f"precision tf32 needs a CUDA device, not {device}")
    value = "tf32" if precision == "tf32" else "ieee"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")  # the older flag must agree
    backends.cudnn.allow_tf32 = precision == "tf32"
    for switch in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        switch.fp32_precision = value


def autocast(precision: str, device: torch.device) -> Any:
    """A context in which products and convolutions are in bf16, if that is the precision; weights stay fp32."""
    # Without autocast's cache: it keeps the rounded weights, and steps within the block change the weights.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def as_graphs(model: nn.Module, images: torch.Tensor, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward and backward pass of a model, for images of this shape, as CUDA graphs: the same kernels, one launch.

    A graph repeats what Python decided once: a model with parts from elsewhere than here and torch comes back as it is.
    """
    if not all(comes_from(part, "models", "torch") for part in model.modules()):
        return model
    gc.collect()  # the graphs of an earlier network are in a reference cycle, and hold memory
    before = {name: value.clone() for name, value in model.state_dict().items()}  # a warm-up changes statistics
    sample = images.contiguous(memory_format=layout_of(model)).clone()  # each batch is copied into this one
    autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # autograd waits for the recording's stream
    here = torch.cuda.stream(torch.cuda.current_stream(images.device))  # not on the first GPU, but on this one
    with here, autocast(precision, images.device), torch.random.fork_rng([images.device]):
        graphs = torch.cuda.make_graphed_callables(nn.Sequential(model), (sample,))
    model.load_state_dict(before)
    return graphs
