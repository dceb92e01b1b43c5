"""Directions: Fourier images against numpy's FFT, random ones, and NADs read from files of all kinds."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.directions import canonical_frequency, fourier_direction, frequency_grid, load_nads, random_direction

SIZES = st.integers(1, 12)


def is_self_conjugate(ky, kx, height, width):
    return 2 * ky % height == 0 and 2 * kx % width == 0


@st.composite
def frequencies(draw):
    """A frequency and an image that holds it: (k_y, k_x, H, W)."""
    height, width = draw(SIZES), draw(SIZES)
    ky, kx = (draw(st.integers(-(size // 2), size // 2)) for size in (height, width))
    return ky, kx, height, width


# --- Fourier images


@given(frequencies(), st.sampled_from(["cosine", "sine"]))
def test_a_fourier_image_is_one_coefficient_of_the_spectrum(frequency, phase):
    ky, kx, height, width = frequency
    if phase == "sine" and is_self_conjugate(*frequency):
        return
    spectrum = np.zeros((height, width))
    spectrum[ky % height, kx % width] = 1
    image = np.fft.ifft2(spectrum)
    image = image.real if phase == "cosine" else image.imag
    v = fourier_direction(ky, kx, height=height, width=width, phase=phase)
    assert v.shape == (1, height, width) and v.dtype == torch.float32
    np.testing.assert_allclose(v[0], image / np.linalg.norm(image), atol=1e-6)
    assert v.double().norm() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (6, 9), (1, 4)])
def test_the_fourier_images_are_an_orthonormal_basis(height, width):
    grid = [(y, x) for y in frequency_grid(height, 1) for x in frequency_grid(width, 1)]
    distinct = {canonical_frequency(y, x, height, width) for y, x in grid}
    images = [fourier_direction(*k, height=height, width=width) for k in distinct]
    images += [
        fourier_direction(*k, height=height, width=width, phase="sine")
        for k in distinct
        if not is_self_conjugate(*k, height, width)
    ]
    basis = torch.stack(images).double().flatten(1)
    assert len(basis) == height * width
    torch.testing.assert_close(basis @ basis.T, torch.eye(height * width).double(), rtol=0, atol=1e-6)


@given(frequencies())
def test_the_sine_is_refused_exactly_where_it_vanishes(frequency):
    ky, kx, height, width = frequency
    if is_self_conjugate(*frequency):
        with pytest.raises(ValueError, match=r"sine image of frequency .* zero everywhere"):
            fourier_direction(ky, kx, height=height, width=width, phase="sine")
    else:
        fourier_direction(ky, kx, height=height, width=width, phase="sine")


@pytest.mark.parametrize(("size", "number"), [(32, 4), (31, 1)])
def test_an_even_image_has_four_frequencies_without_a_sine_and_an_odd_one_only_dc(size, number):
    grid = frequency_grid(size, 1)
    refused = 0
    for y in (grid[0], 0, grid[-1]):
        for x in (grid[0], 0, grid[-1]):
            try:
                fourier_direction(y, x, height=size, width=size, phase="sine")
            except ValueError:
                refused += 1
    assert refused == number


@pytest.mark.parametrize(
    ("ky", "kx", "words"), [(17, 0, "frequency 17 along y"), (0, -17, "frequency -17 along x"), (32, 32, "-16 to 16")]
)
def test_a_frequency_outside_the_image_is_refused(ky, kx, words):
    with pytest.raises(ValueError, match=words):
        fourier_direction(ky, kx)


def test_the_highest_frequency_of_an_odd_image_is_below_half_its_size():
    fourier_direction(4, -4, height=9, width=9)
    with pytest.raises(ValueError, match="expected -4 to 4 for 9 pixels"):
        fourier_direction(5, 0, height=9, width=9)


def test_the_same_image_stands_in_every_channel_or_in_one():
    gray = fourier_direction(2, 3)
    colour = fourier_direction(2, 3, num_channels=3)
    torch.testing.assert_close(colour, gray.expand(3, 32, 32) / 3**0.5)
    green = fourier_direction(2, 3, num_channels=3, channel=1)
    assert torch.equal(green[1:2], gray) and not green[::2].any()
    with pytest.raises(ValueError, match="channel 3 does not exist: expected 0 to 2"):
        fourier_direction(2, 3, num_channels=3, channel=3)


# --- The map


def test_130_experiments_fill_the_published_map():
    grid = frequency_grid(32)
    assert grid == list(range(-16, 15, 2))
    assert len({canonical_frequency(y, x) for y in grid for x in grid}) == 130


@given(st.integers(-40, 40), st.integers(-40, 40), SIZES, SIZES)
def test_a_frequency_its_negative_and_its_aliases_have_one_representative(ky, kx, height, width):
    k = canonical_frequency(ky, kx, height, width)
    assert canonical_frequency(*k, height, width) == k
    assert canonical_frequency(-ky, -kx, height, width) == k
    assert canonical_frequency(ky + height, kx - width, height, width) == k
    assert all(-(size // 2) <= f < (size + 1) // 2 for f, size in zip(k, (height, width), strict=True))


@given(frequencies())
def test_the_representative_has_the_same_image(frequency):
    _, _, height, width = frequency
    k = canonical_frequency(*frequency)
    same, v = (fourier_direction(*f, height=height, width=width) for f in (k, frequency[:2]))
    torch.testing.assert_close(same, v, rtol=0, atol=1e-6)
    if not is_self_conjugate(*k, height, width):
        same, v = (fourier_direction(*f, height=height, width=width, phase="sine") for f in (k, frequency[:2]))
        assert abs((same * v).sum()) == pytest.approx(1, abs=1e-5)  # up to its sign


# --- Random directions


def test_random_directions_are_uniform_on_the_sphere():
    source = torch.Generator().manual_seed(0)
    directions = torch.stack([random_direction((2, 1, 4), source) for _ in range(4000)]).flatten(1)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(4000))
    assert (directions.T @ directions / 4000 - torch.eye(8) / 8).abs().max() < 0.02
    assert directions.mean(0).abs().max() < 0.03


# --- NADs from a file


def orthonormal(dimension, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0]


def save(path, array):
    np.save(path, array)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(dimension=st.integers(1, 20), missing=st.booleans(), seed=st.integers(0, 1000))
def test_nads_come_back_as_rows_and_a_missing_last_one_is_completed(tmp_path_factory, dtype, dimension, missing, seed):
    rows = orthonormal(dimension, seed).astype(dtype)
    if missing and dimension > 1:
        path = save(tmp_path_factory.mktemp("nads") / "U.npy", rows[:-1])
    else:
        path = save(tmp_path_factory.mktemp("nads") / "U.npy", rows)
    nads = load_nads(path, dimension)
    assert nads.shape == (dimension, dimension) and nads.dtype == torch.float32
    np.testing.assert_allclose(nads[:-1], rows[:-1], atol=1e-6)
    assert abs(nads[-1] @ torch.from_numpy(rows[-1]).float()) == pytest.approx(1, abs=1e-4)
    assert (nads @ nads.T - torch.eye(dimension)).abs().max() < 1e-5


def test_a_missing_nad_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no array at .*nothing\.npy: name a \.npy file"):
        load_nads(tmp_path / "nothing.npy", 4)
    with pytest.raises(FileNotFoundError, match="no array at"):
        load_nads(tmp_path, 4)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4), (5, 5), (5, 4), (16,), (1, 4, 4), (0, 4), ()])
def test_nads_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"U.npy has shape .*: expected \(4, 4\), or one row less"):
        load_nads(save(tmp_path / "U.npy", np.zeros(shape)), 4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: 2 * rows,
        lambda rows: rows + 0.01,
        lambda rows: np.vstack([rows[:3], rows[:1]]),
        lambda rows: np.where(np.eye(4) > 0, np.nan, rows),
        lambda rows: np.where(np.eye(4) > 0, np.inf, rows),
        lambda rows: 1e300 * rows,
        np.zeros_like,
    ],
)
def test_rows_that_are_not_orthonormal_numbers_are_refused(tmp_path, spoil):
    with pytest.raises(ValueError, match=r"U.npy are not orthonormal: U Uᵀ differs from I by"):
        load_nads(save(tmp_path / "U.npy", spoil(orthonormal(4))), 4)


class Trap:
    """What a pickle could do."""

    def __reduce__(self):
        """Fail the test that loads it."""
        return (pytest.fail, ("unpickled",))


def test_pickles_are_refused_unread(tmp_path):
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Trap()))
    np.save(tmp_path / "array.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    for name in ("bare.npy", "array.npy"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable \.npy array"):
            load_nads(tmp_path / name, 4)


@pytest.mark.parametrize(
    "content", [b"", b"k_y,k_x\n", b"PK\x03\x04 not a zip", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00"]
)
def test_files_that_are_no_arrays_are_refused(tmp_path, content):
    (tmp_path / "U.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable \.npy array"):
        load_nads(tmp_path / "U.npy", 4)


@pytest.mark.parametrize(
    "array", [np.array([["a", "b"], ["c", "d"]]), np.zeros((2, 2), dtype=[("x", int), ("y", int)])]
)
def test_arrays_that_are_not_of_numbers_are_refused(tmp_path, array):
    with pytest.raises(ValueError, match=r"not a readable \.npy array of numbers"):
        load_nads(save(tmp_path / "U.npy", array), 2)


def test_an_archive_of_arrays_is_refused(tmp_path):
    with open(tmp_path / "U.npy", "wb") as file:
        np.savez(file, U=orthonormal(4))
    with pytest.raises(ValueError, match=r"not a readable \.npy array of numbers"):
        load_nads(tmp_path / "U.npy", 4)


@given(data=st.data())
def test_a_nad_file_cut_anywhere_is_refused(tmp_path_factory, data):
    path = save(tmp_path_factory.mktemp("nads") / "U.npy", orthonormal(4))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"not a readable \.npy array"):
        load_nads(path, 4)
