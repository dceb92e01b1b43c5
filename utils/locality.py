"""Exact evaluation of images that differ from one point in one pixel each: only what that pixel changes.

Through a convolution a pixel reaches a window the size of the kernel, and so on from layer to layer: its receptive
field, seen from the other side. A `LocalBatch` holds the activations of the point once and, for each image, the window
that its pixel has reached so far. Convolutions, pools, sums, concatenations and elementwise layers act on both. All
else, and all that follows once the windows would cover half of the image, gets an ordinary tensor. The network need
not know; the sums are those of the plain way, fewer of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

WORTHWHILE = 0.5  # largest share of the image that windows may cover; beyond it the whole costs no more (measured)

SHAPES = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.shape.__get__,
    Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.requires_grad.__get__,
    Tensor.is_mkldnn.__get__,
}  # fmt: skip
SUMS = {torch.add, Tensor.add, Tensor.__add__}
SUMS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
ELEMENTWISE = {
    F.relu, torch.relu, Tensor.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardtanh, F.relu6, F.hardswish,
    torch.sigmoid, torch.tanh,
}  # fmt: skip
ELEMENTWISE_IN_EVALUATION = {F.batch_norm, F.dropout}


class NotLocal(Exception):
    """The network changes a tensor in place in a way that windows cannot follow."""


class LocalBatch(torch.Tensor):
    """2·g_y·g_x tensors (C, H, W) that equal one base but for a window each.

    The windows of the images (a, i, j), a = 0, 1, begin at row corner[0] + i·spacing, column corner[1] + j·spacing.
    They may reach beyond the border; what they hold there means nothing.
    """

    base: Tensor  # (1, C, H, W)
    windows: Tensor  # (2·g_y·g_x, C, h, w)
    grid: tuple[int, int]  # g_y, g_x
    corner: tuple[int, int]
    spacing: int

    @staticmethod
    def __new__(cls, base: Tensor, windows: Tensor, grid: tuple[int, int], corner: tuple[int, int], spacing: int):
        """As a tensor it is the base, repeated without memory; the windows are attributes."""
        batch = base.expand(len(windows), -1, -1, -1).as_subclass(cls)
        batch.base, batch.windows, batch.grid, batch.corner, batch.spacing = base, windows, grid, corner, spacing
        return batch

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Act on the windows where that is possible and worthwhile, else on whole images."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in SHAPES:
                return function(*args, **kwargs)
            try:
                result = _act(function, args, kwargs)
            except (TypeError, ValueError, IndexError):  # called in an unusual way
                result = None
            if result is None:
                name = getattr(function, "__name__", "")
                written = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
                if written or kwargs.get("inplace") or kwargs.get("out") is not None:
                    raise NotLocal(name)
                args, kwargs = tree_map(lambda value: whole(value) if isinstance(value, cls) else value, (args, kwargs))
                return function(*args, **kwargs)
            if function in SUMS_IN_PLACE:
                args[0].__dict__.update(result.__dict__)  # for those who hold the same tensor by another name
            return result


def shifted_images(
    point: Tensor, channel: int, first: tuple[int, int], spacing: int, step: float
) -> tuple[LocalBatch, Tensor]:
    """The point (C, H, W) with `step` added to, and subtracted from, one pixel: every spacing-th from the first on.

    Returns:
        The images, all those with a pixel moved up before those with one moved down, and the flat indices of these
        pixels, (g_y·g_x,).
    """
    _, height, width = point.shape
    rows = torch.arange(first[0], height, spacing, device=point.device)
    columns = torch.arange(first[1], width, spacing, device=point.device)
    grid = (len(rows), len(columns))
    windows = cut_windows(point[None], grid, first, (1, 1), spacing).repeat(2, 1, 1, 1)
    windows[: len(windows) // 2, channel] += step
    windows[len(windows) // 2 :, channel] -= step
    pixels = channel * height * width + rows[:, None] * width + columns
    return LocalBatch(point[None].clone(), windows, grid, first, spacing), pixels.flatten()


def cut_windows(
    base: Tensor, grid: tuple[int, int], corner: Sequence[int], size: Sequence[int], spacing: int
) -> Tensor:
    """The windows (g_y·g_x, C, h, w) of a base (1, C, H, W) on a grid, 0 beyond its border."""
    padded, (top, left) = _padded(base, grid, corner, size, spacing)
    height, width = ((grid[k] - 1) * spacing + size[k] for k in (0, 1))
    cut = padded[0, :, top : top + height, left : left + width].unfold(1, size[0], spacing).unfold(2, size[1], spacing)
    return cut.permute(1, 2, 3, 4, 0).reshape(grid[0] * grid[1], *size, -1).permute(0, 3, 1, 2)  # channels_last


def whole(batch: LocalBatch) -> Tensor:
    """The images of a batch as an ordinary tensor (2·g_y·g_x, C, H, W)."""
    (height, width), size = batch.base.shape[2:], batch.windows.shape[2:]
    padded, (top, left) = _padded(batch.base, batch.grid, batch.corner, size, batch.spacing)
    canvas = padded.repeat(len(batch.windows), 1, 1, 1).contiguous(memory_format=torch.channels_last)
    image, channel, row, column = canvas.stride()
    down, right = batch.spacing * row, batch.spacing * column
    target = canvas.as_strided(
        (2, *batch.grid, *batch.windows.shape[1:]),
        (batch.grid[0] * batch.grid[1] * image, batch.grid[1] * image + down, image + right, channel, row, column),
        top * row + left * column,
    )
    target.copy_(batch.windows.view(target.shape))
    top, left = top - batch.corner[0], left - batch.corner[1]  # where the image begins
    inner = canvas[:, :, top : top + height, left : left + width]
    return inner.contiguous(memory_format=torch.channels_last)


def _padded(
    base: Tensor, grid: tuple[int, int], corner: Sequence[int], size: Sequence[int], spacing: int
) -> tuple[Tensor, tuple[int, int]]:
    """The base with as many zeros around it as the windows need, and where the first window begins in it."""
    before = [max(0, -corner[k]) for k in (0, 1)]
    after = [max(0, corner[k] + (grid[k] - 1) * spacing + size[k] - base.shape[2 + k]) for k in (0, 1)]
    padded = F.pad(base, (before[1], after[1], before[0], after[0])) if any(before + after) else base
    return padded, (corner[0] + before[0], corner[1] + before[1])


def _act(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> LocalBatch | None:
    """The function on base and windows; None if it is not one of those that can be, or no longer worthwhile."""
    if function is torch.cat and (args[1:] == (1,) or kwargs == {"dim": 1}):
        return _join(args[0], lambda tensors: torch.cat(tensors, 1))
    if not args or not isinstance(args[0], LocalBatch):
        return None
    if function in ELEMENTWISE or (function in ELEMENTWISE_IN_EVALUATION and kwargs.get("training") is False):
        x = args[0]
        base, windows = (function(part, *args[1:], **kwargs) for part in (x.base, x.windows))
        return LocalBatch(base, windows, x.grid, x.corner, x.spacing)
    if function in SUMS | SUMS_IN_PLACE and len(args) == 2 and not kwargs:
        return _join(args, lambda tensors: tensors[0] + tensors[1])
    if function is torch.conv2d:
        return _convolve(*args, **kwargs)
    if function in (F.max_pool2d, F.avg_pool2d):
        return _pool(function, *args, **kwargs)
    return None


def _worthwhile(size: Sequence[int], image: Sequence[int]) -> bool:
    return size[0] * size[1] <= WORTHWHILE * image[0] * image[1]


def _join(batches: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> LocalBatch | None:
    """Join batches on one grid, in windows that hold those of each."""
    if not all(isinstance(batch, LocalBatch) for batch in batches):
        return None
    if len({(batch.grid, batch.spacing, batch.base.shape[2:]) for batch in batches}) > 1:
        return None
    corner = [min(batch.corner[k] for batch in batches) for k in (0, 1)]
    size = [max(batch.corner[k] + batch.windows.shape[2 + k] for batch in batches) - corner[k] for k in (0, 1)]
    first = batches[0]
    if not _worthwhile(size, first.base.shape[2:]):
        return None
    base = join([batch.base for batch in batches])
    windows = join([_resized(batch, corner, size) for batch in batches])
    return LocalBatch(base, windows, first.grid, (corner[0], corner[1]), first.spacing)


def _convolve(
    x: LocalBatch, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> LocalBatch | None:  # fmt: skip
    if isinstance(padding, str) or _pair(dilation) != (1, 1):
        return None
    return _slide(
        x, weight.shape[2:], _pair(stride), _pair(padding),
        lambda images, padding: torch.conv2d(images, weight, bias, stride, padding, groups=groups),
    )  # fmt: skip


def _pool(
    function: Callable[..., Any], x: LocalBatch, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any,
    **options: Any,
) -> LocalBatch | None:  # fmt: skip
    plain = {"ceil_mode": False, "return_indices": False, "count_include_pad": True, "divisor_override": None}
    if _pair(padding) != (0, 0) or rest or _pair(options.pop("dilation", 1)) != (1, 1):
        return None
    if any(options[key] != plain.get(key, options) for key in options):
        return None
    kernel = _pair(kernel_size)
    return _slide(x, kernel, _pair(stride or kernel), (0, 0), lambda images, _: function(images, kernel_size, stride))


def _slide(
    x: LocalBatch, kernel: Sequence[int], stride: tuple[int, int], padding: tuple[int, int],
    slide: Callable[[Tensor, tuple[int, int]], Tensor],
) -> LocalBatch | None:  # fmt: skip
    """Slide a kernel over base and windows: output o sees the inputs o·stride − padding + (0 … kernel − 1)."""
    step = stride[0]
    if stride[1] != step or x.spacing % step:
        return None
    size, image = x.windows.shape[2:], x.base.shape[2:]
    first = tuple(-((kernel[k] - 1 - padding[k] - x.corner[k]) // step) for k in (0, 1))  # ⌈·⌉
    last = tuple((x.corner[k] + size[k] - 1 + padding[k]) // step for k in (0, 1))
    reached = [last[k] - first[k] + 1 for k in (0, 1)]
    outputs = [(image[k] + 2 * padding[k] - kernel[k]) // step + 1 for k in (0, 1)]
    if min(reached) < 1 or not _worthwhile(reached, outputs):  # a large stride may skip the window
        return None
    inside = cut_windows(x.base.new_ones(1, 1, *image), x.grid, x.corner, size, x.spacing)
    if not inside.all():  # beyond the border the kernel sees zeros
        x = LocalBatch(x.base, x.windows * inside.repeat(2, 1, 1, 1), x.grid, x.corner, x.spacing)
    seen = [(reached[k] - 1) * step + kernel[k] for k in (0, 1)]
    windows = slide(_resized(x, [first[k] * step - padding[k] for k in (0, 1)], seen), (0, 0))
    return LocalBatch(slide(x.base, padding), windows, x.grid, first, x.spacing // step)


def _resized(x: LocalBatch, corner: Sequence[int], size: Sequence[int]) -> Tensor:
    """What other windows hold (2·g_y·g_x, C, h, w), filled up from the base and with 0 beyond its border."""
    if tuple(corner) == x.corner and tuple(size) == x.windows.shape[2:]:
        return x.windows
    windows = cut_windows(x.base, x.grid, corner, size, x.spacing).repeat(2, 1, 1, 1)
    down, right = (x.corner[k] - corner[k] for k in (0, 1))
    height, width = x.windows.shape[2:]
    target = windows[:, :, max(0, down) : max(0, down + height), max(0, right) : max(0, right + width)]
    source = x.windows[:, :, max(0, -down) :, max(0, -right) :]
    target.copy_(source[:, :, : target.shape[2], : target.shape[3]])
    return windows


def _pair(value: Any) -> tuple[int, int]:
    """An option of a convolution or a pool, one number or one an axis, as two."""
    values = tuple(int(v) for v in value) if isinstance(value, Sequence) else (int(value),)
    return (values * 2)[:2] if len(values) == 1 else (values[0], values[1])
