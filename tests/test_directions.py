"""Directions: Fourier images against numpy's FFT, random ones, and NADs read from files of all kinds."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import Trap, orthonormal
from utils import directions
from utils.directions import canonical_frequency, fourier_direction, fourier_map, frequency_grid, is_self_conjugate
from utils.nads import load_nads

SIZES = st.integers(1, 12)
PHASES = ["cosine", "sine"]


@st.composite
def frequencies(draw):
    """A frequency and the size of an image that holds it: (k_y, k_x, S)."""
    size = draw(SIZES)
    ky, kx = (draw(st.integers(-(size // 2), size // 2)) for _ in range(2))
    return ky, kx, size


@given(frequencies(), st.sampled_from(PHASES))
def test_a_fourier_image_is_one_coefficient_of_the_spectrum(frequency, phase):
    ky, kx, size = frequency
    if phase == "sine" and is_self_conjugate(*frequency):  # a sine that vanishes
        with pytest.raises(ValueError, match=r"sine image of .* zero everywhere: use the cosine"):
            fourier_direction(ky, kx, size=size, phase=phase)
        return
    spectrum = np.zeros((size, size))
    spectrum[ky % size, kx % size] = 1
    image = np.fft.ifft2(spectrum)
    image = image.real if phase == "cosine" else image.imag
    v = fourier_direction(ky, kx, size=size, phase=phase)
    assert v.shape == (1, size, size) and v.dtype == torch.float32
    np.testing.assert_allclose(v[0], image / np.linalg.norm(image), atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_the_fourier_images_are_an_orthonormal_basis(size):
    grid = frequency_grid(size, 1)
    every = [(y, x) for y in grid for x in grid]
    sines = [k for k in every if not is_self_conjugate(*k, size)]
    images = [*fourier_map(size, frequencies=every).values()]
    images += fourier_map(size, phase="sine", frequencies=sines).values()
    basis = torch.stack(images).double().flatten(1)
    assert len(basis) == size**2
    torch.testing.assert_close(basis @ basis.T, torch.eye(size**2).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("ky", "kx", "size"), [(17, 0, 32), (0, -17, 32), (32, 32, 32), (5, 0, 9)])
def test_a_frequency_outside_the_image_is_refused(ky, kx, size):
    words = rf"frequency {ky or kx} along {'y' if ky else 'x'} .* -{size // 2} to {size // 2} for {size} pixels"
    with pytest.raises(ValueError, match=words):
        fourier_map(size, frequencies=[(0, 0), (ky, kx)])


def test_the_same_image_stands_in_every_channel():
    colour = fourier_direction(2, 3, num_channels=3)
    torch.testing.assert_close(colour, fourier_direction(2, 3).expand(3, 32, 32) / 3**0.5)


def test_130_experiments_fill_the_published_map_and_a_frequency_and_its_negative_are_one():
    grid = frequency_grid(32)
    assert grid == list(range(-16, 15, 2))
    assert fourier_map().keys() == {canonical_frequency(y, x) for y in grid for x in grid}
    assert len(fourier_map()) == 130 and len(fourier_map(phase="sine")) == 126
    assert list(fourier_map(8, frequencies=[(2, 0), (-2, 0), (4, 1), (0, 0)])) == [(-2, 0), (-4, -1), (0, 0)]


@given(st.integers(-40, 40), st.integers(-40, 40), SIZES)
def test_a_frequency_its_negative_and_its_aliases_have_one_representative(ky, kx, size):
    k = canonical_frequency(ky, kx, size)
    assert canonical_frequency(*k, size) == k
    assert canonical_frequency(-ky, -kx, size) == k
    assert canonical_frequency(ky + size, kx - size, size) == k
    assert all(-(size // 2) <= f < (size + 1) // 2 for f in k)


@given(frequencies(), st.sampled_from(PHASES))
def test_the_representative_has_the_same_image_up_to_its_sign(frequency, phase):
    k, size = canonical_frequency(*frequency), frequency[-1]
    if phase == "cosine" or not is_self_conjugate(*k, size):
        same, v = (fourier_direction(*f, size=size, phase=phase) for f in (k, frequency[:2]))
        assert abs((same * v).sum()) == pytest.approx(1, abs=1e-5)


def test_random_directions_are_uniform_on_the_sphere():
    source = torch.Generator().manual_seed(0)
    drawn = torch.stack([directions.random_direction((2, 1, 4), source) for _ in range(4000)]).flatten(1)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(4000))
    assert (drawn.T @ drawn / 4000 - torch.eye(8) / 8).abs().max() < 0.02
    assert drawn.mean(0).abs().max() < 0.03


# --- NADs from a file


def save(folder, content):
    """A file that holds these bytes, or this array."""
    path = folder / "U.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    return path


@given(dimension=st.integers(1, 20), missing=st.booleans(), double=st.booleans(), seed=st.integers(0, 1000))
def test_nads_come_back_as_rows_and_a_missing_last_one_is_completed(tmp_path_factory, dimension, missing, double, seed):
    rows = orthonormal(dimension, seed).astype(np.float64 if double else np.float32)
    found = rows[:-1] if missing and dimension > 1 else rows
    nads = load_nads(save(tmp_path_factory.mktemp("nads"), found), dimension)
    assert nads.shape == (dimension, dimension) and nads.dtype == torch.float32
    np.testing.assert_allclose(nads[:-1], rows[:-1], atol=1e-6)
    assert abs(nads[-1] @ torch.from_numpy(rows[-1]).float()) == pytest.approx(1, abs=1e-4)
    assert (nads @ nads.T - torch.eye(dimension)).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(4, 5), (2, 4), (5, 5), (5, 4), (16,), (1, 4, 4), (0, 4), ()])
def test_nads_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"U.npy has shape .*: expected \(4, 4\), or one row less"):
        load_nads(save(tmp_path, np.zeros(shape)), 4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows + 0.01,
        lambda rows: np.vstack([rows[:3], rows[:1]]),
        lambda rows: np.where(np.eye(4) > 0, np.nan, rows),
        lambda rows: 1e300 * rows,
        np.zeros_like,
    ],
)
def test_rows_that_are_not_orthonormal_numbers_are_refused(tmp_path, spoil):
    with pytest.raises(ValueError, match=r"U.npy are not orthonormal: U Uᵀ differs from I by"):
        load_nads(save(tmp_path, spoil(orthonormal(4))), 4)


np.savez(ARCHIVE := io.BytesIO(), U=orthonormal(4))
CONTENTS = {
    "nothing": b"",
    "no zip": b"PK\x03\x04 not a zip",
    "half a header": b"\x93NUMPY\x01\x00v\x00",
    "pickle": pickle.dumps(Trap()),
    "pickle in an array": np.array([Trap()], dtype=object),
    "letters": np.array([["a", "b"], ["c", "d"]]),
    "records": np.zeros((2, 2), dtype=[("x", int), ("y", int)]),
    "archive": ARCHIVE.getvalue(),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_files_that_are_no_arrays_of_numbers_are_refused_and_pickles_unread(tmp_path, content):
    with pytest.raises(ValueError, match=r"U.npy is not a readable \.npy array of numbers"):
        load_nads(save(tmp_path, content), 2)


@given(data=st.data())
def test_a_nad_file_cut_anywhere_is_refused(tmp_path_factory, data):
    path = save(tmp_path_factory.mktemp("nads"), orthonormal(4))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"not a readable \.npy array"):
        load_nads(path, 4)
