"""The streaming covariance, its eigenvectors, and the measures by which two sets of NADs are compared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.covariance import (
    GradientSum,
    NADs,
    log_variance_correlation,
    median_singular_value_ratio,
    nads_from_covariance,
    subspace_overlap,
)


def sum_of(networks):
    total = GradientSum(networks[0].shape[1])
    for rows in networks:
        total.add(rows)
    return total


def random_basis(dimension, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0].T


def covariance_of(basis, variances):
    return torch.from_numpy(basis.T @ (np.asarray(variances)[:, None] * basis))


@given(number=st.integers(2, 40), dimension=st.integers(1, 8), offset=st.floats(-10, 10), seed=st.integers(0, 99))
def test_the_streaming_covariance_is_numpys(number, dimension, offset, seed):
    gradients = torch.randn(number, dimension, generator=torch.Generator().manual_seed(seed)) + offset
    expected = np.cov(gradients.double().numpy(), rowvar=False).reshape(dimension, dimension)
    np.testing.assert_allclose(sum_of(gradients.split(1)).sampled_covariance(), expected, rtol=1e-9, atol=1e-10)


def test_the_marginal_covariance_is_the_mean_of_the_networks_outer_products():
    networks = torch.randn(7, 5, 4, dtype=torch.float64)
    expected = 0.3 * torch.einsum("nfi,nfj->ij", networks, networks) / 7
    torch.testing.assert_close(sum_of(networks).marginal_covariance(0.3), expected)


@given(order=st.permutations(range(6)), cut=st.integers(1, 5))
@settings(max_examples=30)
def test_neither_the_order_of_the_networks_nor_a_division_into_parts_matters(order, cut):
    networks = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    merged = sum_of(networks[order[:cut]])
    merged.merge(sum_of(networks[order[cut:]]))
    whole = sum_of(networks)
    assert merged.num_networks == whole.num_networks == 6
    torch.testing.assert_close(merged.outer, whole.outer)
    torch.testing.assert_close(merged.rows, whole.rows)


def test_the_state_holds_everything_and_adds_up():
    a, b = sum_of(torch.randn(4, 2, 3)), sum_of(torch.randn(5, 2, 3))
    again = GradientSum.from_state(a.state())
    assert torch.equal(again.outer, a.outer) and torch.equal(again.rows, a.rows) and again.num_networks == 4
    total = GradientSum.from_state(a.state() + b.state())
    a.merge(b)
    assert torch.equal(total.outer, a.outer) and torch.equal(total.rows, a.rows) and total.num_networks == 9


def test_the_sums_are_float64():
    big = torch.tensor([[4096.0]])
    total = sum_of([big, torch.tensor([[0.001]])])  # the square of the second vanishes beside the first in float32
    assert total.outer.item() == pytest.approx(4096**2 + 1e-6, abs=1e-8)


@given(dimension=st.integers(2, 30), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_the_nads_of_a_known_covariance_are_found_in_order(dimension, seed):
    basis = random_basis(dimension, seed)
    variances = 2.0 ** -np.arange(dimension)
    nads = nads_from_covariance(covariance_of(basis, variances))
    assert nads.directions.dtype == np.float32
    np.testing.assert_allclose(np.abs((nads.directions * basis).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(nads.directions @ nads.directions.T, np.eye(dimension), atol=1e-6)
    np.testing.assert_allclose(nads.singular_values, np.sqrt(9999 * variances), rtol=1e-5)
    assert (np.diff(nads.singular_values) <= 0).all()


def test_the_sign_of_a_direction_survives_noise():
    basis = random_basis(40)
    covariance = covariance_of(basis, np.geomspace(1, 1e-4, 40))
    directions = nads_from_covariance(covariance).directions
    for seed in range(10):
        noise = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noisy = nads_from_covariance(covariance + 1e-9 * (noise + noise.T)).directions
        assert ((noisy * directions).sum(1) > 0.99).all()


def test_the_singular_values_do_not_depend_on_the_number_of_networks_and_are_never_nan():
    gradients = torch.randn(2000, 6, dtype=torch.float64)
    few, all_ = (nads_from_covariance(sum_of(g.split(1)).sampled_covariance()) for g in (gradients[:1000], gradients))
    np.testing.assert_allclose(few.singular_values, all_.singular_values, rtol=0.1)
    centred = (gradients - gradients.mean(0)).numpy()
    np.testing.assert_allclose(all_.singular_values * np.sqrt(1999 / 9999), np.linalg.svd(centred)[1], rtol=1e-9)
    deficient = nads_from_covariance(sum_of(torch.randn(1, 2, 6)).marginal_covariance(1.0))  # rank 2 of 6
    assert np.isfinite(deficient.singular_values).all() and (deficient.singular_values[2:] < 1e-4).all()


@given(dimension=st.integers(2, 20), data=st.data())
@settings(max_examples=30)
def test_overlap_is_1_for_a_rotated_basis_of_the_same_subspace_symmetric_and_within_its_bounds(dimension, data):
    k = data.draw(st.integers(1, dimension))
    a, b = random_basis(dimension), random_basis(dimension, data.draw(st.integers(1, 99)))
    rotated = random_basis(k, 7) @ a[:k]
    assert subspace_overlap(a, rotated, k) == pytest.approx(1)
    assert subspace_overlap(a, b, k) == pytest.approx(subspace_overlap(b, a, k))
    assert max(0, 2 * k - dimension) / k - 1e-9 <= subspace_overlap(a, b, k) <= 1 + 1e-9


def test_overlap_of_random_subspaces_is_k_by_d():
    overlaps = [subspace_overlap(random_basis(40, seed), random_basis(40, seed + 1), 10) for seed in range(0, 100, 2)]
    assert np.mean(overlaps) == pytest.approx(10 / 40, abs=4 * np.std(overlaps) / 50**0.5)


@pytest.mark.parametrize("k", [0, -1, 8, 100])
def test_overlap_beyond_the_directions_at_hand_is_refused(k):
    with pytest.raises(ValueError, match=rf"k={k} is beyond the directions at hand: expected 1 to 7"):
        subspace_overlap(np.eye(8), np.eye(8)[:7], k)


def test_a_spectrum_agrees_with_itself_and_with_any_multiple_of_itself():
    values = np.geomspace(1, 1e-3, 12)
    a, b = NADs(random_basis(12), values), NADs(random_basis(12), 3 * values)
    assert log_variance_correlation(a, b) == pytest.approx(1)
    assert median_singular_value_ratio(a, b) == pytest.approx(1 / 3)


def test_log_variances_are_taken_along_the_rows_of_the_second():
    values_a, values_b = np.array([4.0, 2.0, 1.0]), np.array([3.0, 2.0, 1.5])
    turn = np.array([[0.6, 0.8, 0], [-0.8, 0.6, 0], [0, 0, 1.0]])  # rows of B in A's basis
    along_b = turn**2 @ values_a**2
    expected = np.corrcoef(np.log(along_b), np.log(values_b**2))[0, 1]
    basis = random_basis(3)
    found = log_variance_correlation(NADs(basis, values_a), NADs(turn @ basis, values_b))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("rows_a", "rows_b"), [(16, 15), (15, 16), (15, 15)])
def test_files_whose_last_direction_is_missing_can_be_compared(rows_a, rows_b):
    basis, values = random_basis(16), np.geomspace(1, 1e-2, 16)
    a, b = NADs(basis[:rows_a], values[:rows_a]), NADs(basis[:rows_b], 2 * values[:rows_b])
    correlation = log_variance_correlation(a, b)
    assert correlation == pytest.approx(1)
    assert median_singular_value_ratio(a, b) == pytest.approx(0.5)
    # as the loader gives them: all directions, one singular value less
    whole = NADs(basis, values[:15])
    assert log_variance_correlation(whole, whole) == pytest.approx(1)


def test_directions_without_variance_do_not_spoil_the_measures():
    basis, values = random_basis(6), np.array([3.0, 2, 1, 0.5, 0, 0])
    nads = NADs(basis, values)
    assert median_singular_value_ratio(nads, nads) == 1
    assert log_variance_correlation(NADs(basis, np.geomspace(1, 0.1, 6)), nads) <= 1
