"""D(v): the margin along v, the labels, and the noise in every other direction."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.directions import fourier_direction, random_direction
from utils.linear_data import sample_linear_data


def generator(seed):
    return torch.Generator().manual_seed(seed)


def along(images, direction):
    """⟨x, v⟩ of every sample, in float64."""
    return images.double().flatten(1) @ direction.double().flatten()


@given(
    num_samples=st.integers(1, 40),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    epsilon=st.floats(1e-3, 100),
    sigma=st.floats(0, 100),
    seed=st.integers(0, 2**32),
)
def test_every_sample_lies_epsilon_from_the_boundary_on_its_side(num_samples, shape, epsilon, sigma, seed):
    v = random_direction(shape, generator(seed))
    images, labels = sample_linear_data(v, num_samples, epsilon=epsilon, sigma=sigma, generator=generator(seed + 1))
    assert images.shape == (num_samples, *shape) and images.dtype == v.dtype
    zeros = (num_samples + 1) // 2  # half a class each; class 0, where y = +1, gets the extra sample
    assert labels.tolist() == [0] * zeros + [1] * (num_samples - zeros)
    rounding = 2e-7 * (sigma * math.sqrt(v.numel()) + 5 * epsilon)
    torch.testing.assert_close(along(images, v), epsilon * (1 - 2 * labels.double()), rtol=0, atol=rounding)


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_the_noise_is_isotropic_around_v_with_standard_deviation_sigma(sigma):
    v = random_direction((1, 4, 4), generator(0))
    images, labels = sample_linear_data(v, 40_000, sigma=sigma, generator=generator(1))
    flat, unit = images.double().flatten(1), v.double().flatten()
    noise = flat - torch.outer(1.0 - 2 * labels, unit)
    covariance = noise.T @ noise / len(noise)
    expected = sigma**2 * (torch.eye(16) - torch.outer(unit, unit))
    assert (covariance - expected).abs().max() < 0.05 * sigma**2  # 7 standard deviations of an entry
    for label in (0, 1):  # the same noise in both classes: nothing else carries the label
        assert noise[labels == label].mean(0).abs().max() < 0.05 * sigma


def test_without_noise_a_sample_is_its_label_times_v():
    v = random_direction((2, 3, 3), generator(0))
    images, _ = sample_linear_data(v, 2, epsilon=0.5, sigma=0.0, generator=generator(1))
    torch.testing.assert_close(images, torch.stack([0.5 * v, -0.5 * v]))


def test_the_generator_decides_the_samples_and_its_next_ones_are_others():
    v, source = fourier_direction(1, 2, size=8), generator(3)
    one, again, other = (sample_linear_data(v, 10, generator=g)[0] for g in (source, generator(3), source))
    assert torch.equal(one, again)
    assert not torch.isclose(one, other).any(0).all()
