"""Figures: what stands where in a map, and that every kind is drawn and saved without a warning."""

import matplotlib
import numpy as np
import pytest

from utils import plotting
from utils.directions import fourier_map, frequency_grid


def test_a_map_has_k_y_in_rows_dc_in_the_middle_and_each_frequency_beside_its_negative():
    values = plotting.map_array({(-2, 0): 70.0, (0, 0): 90.0}, 8, frequency_grid(8))  # −4, −2, 0, 2
    assert values[2, 2] == 90 and values[1, 2] == values[3, 2] == 70 and np.isnan(values).sum() == 13
    values = {k: float(number) for number, k in enumerate(fourier_map(32))}
    array = plotting.map_array(values, 32, frequency_grid(32))
    inner = array[1:, 1:]  # −14 to 14
    assert array.shape == (16, 16) and np.isfinite(array).all() and len(np.unique(array)) == 130
    assert np.array_equal(inner, inner[::-1, ::-1])


@pytest.mark.parametrize(("scale", "shape"), [("accuracy", (4, 4)), ("steps", (4, 4)), ("sensitivity", (8, 8))])
def test_an_odd_frequency_makes_the_map_finer(tmp_path, scale, shape):
    values = {(-2, 0): 2.0, (0, 0): np.nan} | ({(-3, 1): 0.1} if shape == (8, 8) else {})
    drawn = plotting.map_figure(values, 8, "title", scale=scale)
    (image,) = drawn.axes[0].images
    assert image.get_array().shape == shape
    plotting.save_figure(drawn, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize(("published", "rows"), [({}, 2), ({(0, 0): 99.0}, 3)])
def test_a_prediction_stands_above_what_was_measured_and_published(tmp_path, published, rows):
    networks = {"LeNet": ({(0, 0): 2.0}, {(0, 0): 60.0}, published), "VGG11 without pooling": ({(0, 0): 0.5}, {}, {})}
    figure = plotting.prediction_figure(networks, 4)
    assert len([axes for axes in figure.axes if axes.images]) == 2 * rows
    plotting.save_figure(figure, tmp_path / "prediction.png")


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_curves_and_points_are_drawn(tmp_path, scale):
    x, y = np.arange(1.0, 4), np.array([60.0, 80, 70])
    names = {"xlabel": "x", "ylabel": "y"}
    curve = plotting.curve_figure(x, {"a": y, "b": y + 1}, spread=y / 10, yscale=scale, title="t", **names)
    assert len(curve.axes[0].lines) == 2 and curve.axes[0].get_legend()
    assert all(tick.is_integer() for tick in curve.axes[0].get_xticks())
    plotting.save_figure(curve, tmp_path / "curve.png")
    points = plotting.scatters_figure({"t": (x, y)}, xscale=scale, **names)
    assert len(points.axes[0].lines) == (scale == "linear")  # the line of equality
    plotting.save_figure(points, tmp_path / "points.png")


def test_a_matplotlibrc_changes_no_figure_and_no_text_is_markup(tmp_path):
    images = {"row": np.zeros((1, 3, 4, 4))}
    for path, settings in {"plain.png": {}, "theirs.png": {"text.usetex": True, "font.size": 30}}.items():
        with matplotlib.rc_context(settings):
            figure = plotting.image_rows_figure(images, [r"$\class$ $ 50%_^"])
            plotting.save_figure(figure, tmp_path / path)
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()
