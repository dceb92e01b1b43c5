"""NADs: central differences and covariances against closed forms, and the measures by which two sets are compared."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import orthonormal
from utils import files
from utils.nads import (
    CHUNK_PIXELS,
    GradientSums,
    NADs,
    central_differences,
    log_variance_correlation,
    nads_of_covariance,
    nads_of_gradients,
    read_sums,
    singular_value_ratios,
    subspace_overlap,
)

# --- Central differences


def quadratic(num_features, shape):
    """h_f(x) = ½ xᵀ A_f x + b_f x, a point, and the Jacobian A x + b there, in float64."""
    generator = torch.Generator().manual_seed(0)
    dimension = shape[0] * shape[1] * shape[2]
    a = torch.randn(num_features, dimension, dimension, generator=generator, dtype=torch.float64)
    a = a + a.transpose(1, 2)
    b = torch.randn(num_features, dimension, generator=generator, dtype=torch.float64)
    point = torch.randn(shape, generator=generator, dtype=torch.float64)

    def function(x):
        x = x.flatten(1)
        return torch.einsum("ni,fij,nj->nf", x, a, x) / 2 + x @ b.T

    return function, point, a @ point.flatten() + b


@given(step=st.floats(1e-2, 1e3), shape=st.tuples(*[st.integers(1, 4)] * 3), num_features=st.integers(1, 3))
@settings(max_examples=30)
def test_central_differences_of_a_quadratic_are_exact_at_any_step(step, shape, num_features):
    function, point, jacobian = quadratic(num_features, shape)
    torch.testing.assert_close(central_differences(function, point, step=step), jacobian, rtol=1e-9, atol=1e-9)
    directions = torch.randn(7, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = central_differences(function, point, directions=directions, step=step)
    torch.testing.assert_close(found, jacobian @ directions.flatten(1).T, rtol=1e-9, atol=1e-9)


@given(chunk_size=st.integers(1, 200), step=st.sampled_from([1e-3, 1.0, 100.0]))
@settings(max_examples=30)
def test_the_differences_do_not_depend_on_the_chunk_size(chunk_size, step):
    function, point, _ = quadratic(2, (2, 4, 5))
    sizes, seen = [], lambda x: sizes.append(len(x)) or function(x).sin()
    whole = central_differences(seen, point, step=step)
    assert sizes.pop() == 80
    with mock.patch.dict(CHUNK_PIXELS, cpu=20 * chunk_size):
        parts = central_differences(seen, point, step=step)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    assert max(sizes) == 2 * max(1, min(40, chunk_size // 2)) and sum(sizes) == 80  # the two images of a pixel together


def test_the_step_reaches_beyond_a_kink_that_backpropagation_does_not_see():
    found = central_differences(lambda x: (x.flatten(1) - 1).relu(), torch.zeros(1, 1, 2), step=100.0)
    torch.testing.assert_close(found, torch.eye(2) * 99 / 200)


def test_pixels_are_ordered_channel_row_column_and_the_result_is_of_the_points_type_without_a_graph():
    point, layer = torch.randn(3, 2, 4), torch.nn.Linear(24, 24)
    torch.nn.init.eye_(layer.weight)
    found = central_differences(lambda x: layer(x.flatten(1)).bfloat16(), point, step=128.0)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, torch.eye(24), rtol=0, atol=0.01)


# --- Sums, covariances and their eigenvectors


def sum_of(networks, numbers=None):
    """The sums over networks, rows (R, D) each, of these numbers."""
    total = GradientSums(networks[0].shape[1])
    for number, rows in zip(numbers or range(len(networks)), networks, strict=True):
        total.add(number, rows)
    return total


def test_covariances_that_do_not_fit_are_one_line():
    with pytest.raises(MemoryError, match="no room for the covariances of 10000000 pixels: 1600000 GB"):
        GradientSums(10**7)


def covariance_of(basis, variances):
    return torch.from_numpy(basis.T @ (np.asarray(variances)[:, None] * basis))


@given(number=st.integers(4, 40), dimension=st.integers(1, 8), offset=st.floats(-10, 10), seed=st.integers(0, 99))
def test_the_sampled_covariance_is_numpys_of_all_networks_and_of_each_half(number, dimension, offset, seed):
    gradients = torch.randn(number, dimension, generator=torch.Generator().manual_seed(seed)) + offset
    total = sum_of(gradients.split(1))
    for halves, part in {(0, 1): gradients, (0,): gradients[::2], (1,): gradients[1::2]}.items():
        expected = np.cov(part.double().numpy(), rowvar=False).reshape(dimension, dimension)
        np.testing.assert_allclose(total.covariance("sampled", halves), expected, rtol=1e-9, atol=1e-10)


def test_the_marginal_covariance_is_the_mean_of_the_networks_outer_products_and_the_halves_agree():
    networks = torch.randn(7, 5, 4, dtype=torch.float64)
    total = sum_of(networks)
    for halves, part in {(0, 1): networks, (0,): networks[::2], (1,): networks[1::2]}.items():
        expected = torch.einsum("nfi,nfj->ij", part, part) / len(part)
        torch.testing.assert_close(total.covariance("marginal", halves), expected)
    assert total.agreement("marginal", 4) == pytest.approx(1) and 0 < total.agreement("marginal", 2) < 1
    assert np.isnan(sum_of(networks[:3]).agreement("marginal", 2))


@given(order=st.permutations(range(6)), cut=st.integers(1, 5))
@settings(max_examples=30)
def test_neither_the_order_of_the_networks_nor_a_division_into_parts_matters(tmp_path_factory, order, cut):
    networks = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("parts")
    for number, part in enumerate((order[:cut], order[cut:], order[:cut])):  # the last one is a copy of the first
        sum_of(networks[part], part).save(folder / f"part-{number}.pt")
    merged, whole = read_sums(folder.glob("*.pt"), 5), sum_of(networks)
    assert merged.numbers == whole.numbers == set(range(6))
    torch.testing.assert_close(merged.outer, whole.outer)
    torch.testing.assert_close(merged.total, whole.total)


def test_a_part_that_shares_some_networks_with_another_is_refused(tmp_path):
    for part in ([0, 1], [1, 2]):
        sum_of(torch.randn(2, 2, 3), part).save(tmp_path / f"part-{part[0]}.pt")
    with pytest.raises(ValueError, match=r"part-1.pt and another part both have network 1 \(1 in all\): delete one"):
        read_sums(tmp_path.glob("*.pt"), 3)


@pytest.mark.parametrize("damage", [{"numbers": None}, {"outer": torch.zeros(2, 4, 4)}, {"total": None}])
def test_a_file_of_other_sums_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "part-0.pt"
    sum_of(torch.randn(2, 2, 3)).save(path)
    for wrong in (files.load_checkpoint(path) | damage, [1, 2], {}):
        files.save_checkpoint(path, wrong)
        with pytest.raises(ValueError, match=r"part-0.pt (does not hold sums of 3 pixels|cannot be read)"):
            read_sums([path], 3)


def test_the_papers_protocol_is_the_principal_components_of_the_gradients():
    gradients = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 6) + 3
    nads, summed = nads_of_gradients(gradients), nads_of_covariance(sum_of(gradients.split(1)).covariance("sampled"))
    _, values, rows = np.linalg.svd(gradients.double().numpy() - gradients.double().numpy().mean(0))
    np.testing.assert_allclose(nads.singular_values, values * np.sqrt(9999 / 49), rtol=1e-6)
    np.testing.assert_allclose(np.abs((nads.directions * rows).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(nads.directions, summed.directions, atol=1e-5)


@given(dimension=st.integers(2, 30), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_the_nads_of_a_known_covariance_are_found_in_order(dimension, seed):
    basis, variances = orthonormal(dimension, seed), 2.0 ** -np.arange(dimension)
    nads = nads_of_covariance(covariance_of(basis, variances))
    assert nads.directions.dtype == np.float32
    np.testing.assert_allclose(np.abs((nads.directions * basis).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(nads.directions @ nads.directions.T, np.eye(dimension), atol=1e-6)
    np.testing.assert_allclose(nads.singular_values, np.sqrt(9999 * variances), rtol=1e-5)


def test_the_sign_of_a_direction_survives_noise_and_singular_values_are_never_nan():
    covariance = covariance_of(orthonormal(40), [*np.geomspace(1, 1e-4, 38), 0, 0])
    nads = nads_of_covariance(covariance)
    assert (nads.singular_values[38:] < 1e-4).all()  # a variance of zero may come out below it
    for seed in range(10):
        noise = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noisy = nads_of_covariance(covariance + 1e-9 * (noise + noise.T)).directions
        assert ((noisy * nads.directions).sum(1)[:38] > 0.99).all()


@given(dimension=st.integers(2, 20), data=st.data())
@settings(max_examples=30)
def test_overlap_is_1_for_a_rotated_basis_of_the_same_subspace_symmetric_and_within_its_bounds(dimension, data):
    k = data.draw(st.integers(1, dimension))
    a, b = orthonormal(dimension), orthonormal(dimension, data.draw(st.integers(1, 99)))
    assert subspace_overlap(a, orthonormal(k, 7) @ a[:k], k) == pytest.approx(1)
    assert subspace_overlap(a, b, k) == pytest.approx(subspace_overlap(b, a, k))
    assert max(0, 2 * k - dimension) / k - 1e-9 <= subspace_overlap(a, b, k) <= 1 + 1e-9


def test_overlap_beyond_the_directions_at_hand_is_refused():
    for k in (0, -1, 8):
        with pytest.raises(ValueError, match=rf"k={k} is beyond the directions at hand: expected 1 to 7"):
            subspace_overlap(np.eye(8), np.eye(8)[:7], k)


def test_log_variances_are_taken_along_the_rows_of_the_second():
    values_a, values_b = np.array([4.0, 2.0, 1.0]), np.array([3.0, 2.0, 1.5])
    turn = np.array([[0.6, 0.8, 0], [-0.8, 0.6, 0], [0, 0, 1.0]])  # rows of B in A's basis
    expected = np.corrcoef(np.log(turn**2 @ values_a**2), np.log(values_b**2))[0, 1]
    basis = orthonormal(3)
    found = log_variance_correlation(NADs(basis, values_a), NADs(turn @ basis, values_b))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("rows_a", "rows_b"), [(16, 16), (16, 15), (15, 16), (15, 15)])
def test_a_spectrum_agrees_with_any_multiple_of_itself_also_where_the_last_direction_is_missing(rows_a, rows_b):
    basis, values = orthonormal(16), np.array([*np.geomspace(1, 1e-2, 14), 0, 0])  # two directions without variance
    a, b = NADs(basis[:rows_a], values[:rows_a]), NADs(basis[:rows_b], 2 * values[:rows_b])
    assert log_variance_correlation(a, b) == pytest.approx(1)
    assert singular_value_ratios(a, b) == pytest.approx(0.5)
    whole = NADs(basis, values[:rows_b])  # as the loader gives them: all directions, perhaps one singular value less
    assert log_variance_correlation(whole, whole) == pytest.approx(1)
