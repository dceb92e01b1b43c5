"""Figures: arrays in, a matplotlib Figure out, which needs no closing. Nothing else here knows matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from scipy.cluster import hierarchy

from utils.directions import canonical_frequency, frequency_grid
from utils.files import replacing

in_style = style.context(Path(__file__).with_name("figures.mplstyle"))  # a decorator, of what draws or saves
SENSITIVITY = {"norm": LogNorm(1 / 16, 16, clip=True), "cmap": "RdBu_r"}  # white at 1, the same for all networks
ACCURACIES = {"vmin": 50, "vmax": 100}  # %, in the style's own colours


@in_style
def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure to `path` (png), whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


@in_style
def style_colors() -> dict[str, Any]:
    """The figures' colours as #rrggbb, for what is drawn elsewhere: each scale's ends with its 256, and the lines'."""
    ends = {
        "sensitivity": (SENSITIVITY["norm"].vmin, SENSITIVITY["norm"].vmax),
        "accuracies": tuple(ACCURACIES.values()),
    }
    maps = {"sensitivity": SENSITIVITY["cmap"], "accuracies": matplotlib.rcParams["image.cmap"]}
    colors = {name: map(matplotlib.colormaps[maps[name]], range(256)) for name in maps}
    scales = {name: {"ends": ends[name], "colors": "".join(map(to_hex, colors[name]))} for name in maps}
    return scales | {"lines": list(map(to_hex, matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]))}


@in_style
def map_figure(values: Mapping[tuple[int, int], float], size: int, title: str, *, sensitivity: bool = False) -> Figure:
    """A map by frequency, DC in the middle, gaps grey: test accuracy (%), or relative sensitivity (logarithmic)."""
    figure = Figure(figsize=(4.9 if sensitivity else 4.6, 3.9))
    image = draw_map(figure.add_subplot(), values, size, title, **(SENSITIVITY if sensitivity else ACCURACIES))
    label = "relative sensitivity (1: to a random direction)" if sensitivity else "test accuracy (%)"
    figure.colorbar(image, label=label, extend="both" if sensitivity else "min")
    return figure


@in_style
def prediction_figure(networks: dict[str, tuple[dict, dict, dict]], size: int) -> Figure:
    """One column for each network: its predicted map, and below it the measured and the published one, if any has one.

    For each name: relative sensitivity, and the two accuracies (%), by canonical frequency.
    """
    labels = ("predicted", "measured here", "published")
    kinds = [kind for kind in range(3) if any(maps[kind] for maps in networks.values())]
    figure = Figure(figsize=(2.1 * len(networks) + 0.6, 2.2 * len(kinds) + 0.3))
    grid = figure.subplots(len(kinds), len(networks), squeeze=False)
    for column, (name, maps) in enumerate(networks.items()):
        for row, kind in enumerate(kinds):
            scale = SENSITIVITY if kind == 0 else ACCURACIES
            title = name.replace(" without", "\nwithout") if row == 0 else ""
            image = draw_map(grid[row, column], maps[kind], size, title, **scale)
            grid[row, column].set(xlabel="", ylabel=labels[kind] if column == 0 else "", xticks=[], yticks=[])
            if column == len(networks) - 1:
                label = "relative sensitivity" if kind == 0 else "test accuracy (%)"
                figure.colorbar(image, ax=grid[row, :].tolist(), label=label)
    return figure


@in_style
def sheet_figure(maps: np.ndarray, names: Sequence[str], links: np.ndarray) -> Figure:
    """Maps of relative sensitivity (n, 16, 16) beside scipy's dendrogram of them, in its order and with its colours."""
    columns = 8
    figure = Figure(figsize=(13.0, 1.1 * -(-len(maps) // columns) + 1.0))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.2))
    axes = left.add_subplot()
    options = {"leaf_font_size": 7, "color_threshold": links[-6:, 2].min()}  # six groups of one colour each
    tree = hierarchy.dendrogram(links, orientation="left", labels=list(names), ax=axes, **options)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    grid = right.subplots(-(-len(maps) // columns), columns)
    for panel in grid.flat:
        panel.set_axis_off()
    for panel, leaf, color in zip(grid.flat, tree["leaves"], tree["leaves_color_list"], strict=False):
        image = panel.imshow(maps[leaf], origin="lower", **SENSITIVITY)
        panel.set_title(names[leaf], fontsize=7, color=color, pad=2)
    label = "relative sensitivity (1: to a random direction)"
    right.colorbar(image, ax=grid, location="bottom", shrink=0.5, aspect=40, label=label, extend="both")
    return figure


def draw_map(axes: Axes, values: Mapping[tuple[int, int], float], size: int, title: str, **scale: Any) -> AxesImage:
    """Draw values by their canonical frequency over k_y (up) and k_x; cells without one stay grey."""
    coarse = frequency_grid(size)
    frequencies = coarse if all(y in coarse and x in coarse for y, x in values) else frequency_grid(size, 1)
    grid = map_array(values, size, frequencies)
    half = (frequencies[1] - frequencies[0]) / 2 if len(frequencies) > 1 else 1
    edges = (frequencies[0] - half, frequencies[-1] + half)
    axes.set_facecolor("0.85")
    image = axes.imshow(grid, origin="lower", extent=(*edges, *edges), **scale)
    axes.set(xlabel="horizontal frequency (cycles per image)", ylabel="vertical frequency (cycles per image)")
    ticks = frequencies[:: max(1, len(frequencies) // 4)]
    axes.set(title=title, xticks=ticks, yticks=ticks)
    return image


def map_array(values: Mapping[tuple[int, int], float], size: int, frequencies: Sequence[int]) -> np.ndarray:
    """Values by canonical frequency as an array, rows k_y and columns k_x; nan where there is none."""
    return np.array([[values.get(canonical_frequency(y, x, size), np.nan) for x in frequencies] for y in frequencies])


@in_style
def curve_figure(
    x: np.ndarray, curves: dict[str, np.ndarray], *, spread: np.ndarray | None = None, **labels: Any
) -> Figure:
    """Curves over a common x, shapes (k,), each with its label; a band of ± spread, (k,), if one is given.

    `labels` are those of matplotlib's `Axes.set`.
    """
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.add_subplot(**labels)
    axes.xaxis.get_major_locator().set_params(integer=True)  # x counts epochs, or NADs
    for label, y in curves.items():
        (line,) = axes.plot(x, y, label=label, marker="o" if len(x) < 40 else "", markersize=3)
        if spread is not None:
            axes.fill_between(x, y - spread, y + spread, color=line.get_color(), alpha=0.25, linewidth=0)
    if len(axes.lines) > 1:
        axes.legend()
    return figure


@in_style
def scatters_figure(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], **labels: Any) -> Figure:
    """Two measurements of the same things (k,), a panel for each title; on linear scales with the line of equality."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(9.0, 2.3 * rows) if columns > 1 else (3.8, 3.7))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, subplot_kw=labels)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, (x, y)) in zip(grid.flat, panels.items(), strict=False):
        if axes.get_xscale() == "linear":
            ends = (min(x.min(), y.min()), max(x.max(), y.max()))
            axes.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
            axes.set_aspect("equal")
        axes.scatter(x, y, s=11, alpha=0.7)
        axes.set_title(title)
        axes.label_outer()
    return figure


@in_style
def nads_figure(directions: dict[str, np.ndarray], spectra: dict[str, np.ndarray] | None = None) -> Figure:
    """The first NADs (k, C, H, W) of each architecture, pixels over Fourier energy; below, spectra (D,) if given."""
    k = max(len(rows) for rows in directions.values())
    heights = [1] * 2 * len(directions) + ([2.2] if spectra else [])
    figure = Figure(figsize=(1.05 * k + 0.6, 2.1 * len(directions) + (2.4 if spectra else 0)))
    grid = figure.add_gridspec(len(heights), k, height_ratios=heights)
    for group, (name, rows) in enumerate(directions.items()):
        for column, direction in enumerate(rows):
            pixels = figure.add_subplot(grid[2 * group, column])
            energy = figure.add_subplot(grid[2 * group + 1, column])
            show_direction(pixels, energy, direction)
            if group == 0:
                pixels.set_title(f"NAD {column}")
            if column == 0:
                pixels.set_ylabel(f"{name}\npixels")
                energy.set_ylabel("Fourier\nenergy")
    if spectra:
        axes = figure.add_subplot(grid[-1, :])
        for name, values in spectra.items():
            axes.plot(np.arange(len(values)), values, label=name)
        axes.set(yscale="log", xlabel="NAD index", ylabel="singular value")
        if len(spectra) > 1:
            axes.legend()
    return figure


def show_direction(pixels, energy, direction: np.ndarray) -> None:
    """Draw a direction (C, H, W), as colours around grey, and its energy in the Fourier domain over all channels."""
    limit = np.abs(direction).max()
    if len(direction) == 3:
        pixels.imshow(0.5 + direction.transpose(1, 2, 0) / (2 * limit))
    else:
        pixels.imshow(direction.mean(0), vmin=-limit, vmax=limit, cmap="RdBu_r")
    spectrum = np.square(np.abs(np.fft.fftshift(np.fft.fft2(direction), axes=(-2, -1)))).sum(0)
    energy.imshow(spectrum / spectrum.max(), vmin=0, vmax=1, origin="lower")
    for axes in (pixels, energy):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)


@in_style
def image_rows_figure(rows: dict[str, np.ndarray], titles: Sequence[str]) -> Figure:
    """Rows of images, each (k, 3, H, W) in [0, 1] (clipped for display), with a title over each column."""
    figure = Figure(figsize=(0.95 * len(titles) + 0.8, 1.05 * len(rows) + 0.3))
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for axes_row, (label, images) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label.replace(", ", ",\n"))
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(image.transpose(1, 2, 0).clip(0, 1))
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    return figure


@in_style
def nad_detail_figure(
    direction: np.ndarray, index: int, singular_values: np.ndarray, accuracies: tuple[np.ndarray, np.ndarray]
) -> Figure:
    """One NAD (C, H, W): pixels, Fourier energy, place in the spectrum (D,), accuracies (NAD indices, percent)."""
    figure = Figure(figsize=(9.0, 2.5))
    pixels, energy, spectrum, curve = figure.subplots(1, 4, width_ratios=[1, 1, 1.3, 1.3])
    show_direction(pixels, energy, direction)
    pixels.set_title(f"NAD {index}")
    energy.set_title("Fourier energy")
    spectrum.plot(singular_values)
    spectrum.plot(index, singular_values[index], "o", color="C1")
    spectrum.set(yscale="log", xlabel="NAD index", ylabel="singular value")
    curve.plot(*accuracies, marker="o", markersize=3)
    curve.axvline(index, color="C1")
    curve.set(ylim=(45, 102), xlabel="NAD index", ylabel="test accuracy (%)")
    return figure
