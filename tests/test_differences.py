"""Central differences and the exact Jacobian, against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.differences import autograd_jacobian, central_differences


def quadratic(num_features, shape, seed=0):
    """h_f(x) = ½ xᵀ A_f x + b_f x, and its Jacobian A x + b, in float64."""
    generator = torch.Generator().manual_seed(seed)
    dimension = shape[0] * shape[1] * shape[2]
    a = torch.randn(num_features, dimension, dimension, generator=generator, dtype=torch.float64)
    a = a + a.transpose(1, 2)
    b = torch.randn(num_features, dimension, generator=generator, dtype=torch.float64)
    point = torch.randn(shape, generator=generator, dtype=torch.float64)

    def function(x):
        x = x.flatten(1)
        return torch.einsum("ni,fij,nj->nf", x, a, x) / 2 + x @ b.T

    return function, point, a @ point.flatten() + b


@given(
    step=st.floats(1e-2, 1e3),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    num_features=st.integers(1, 3),
)
@settings(max_examples=30)
def test_central_differences_of_a_quadratic_are_exact_at_any_step(step, shape, num_features):
    function, point, jacobian = quadratic(num_features, shape)
    differences = central_differences(function, point, step=step)
    assert differences.shape == jacobian.shape
    torch.testing.assert_close(differences, jacobian, rtol=1e-9, atol=1e-9)


@given(chunk_size=st.integers(1, 200), step=st.sampled_from([1e-3, 1.0, 100.0]))
@settings(max_examples=30)
def test_the_differences_do_not_depend_on_the_chunk_size(chunk_size, step):
    function, point, _ = quadratic(2, (2, 4, 5))
    whole = central_differences(lambda x: function(x).sin(), point, step=step, chunk_size=80)
    parts = central_differences(lambda x: function(x).sin(), point, step=step, chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 8, 1000])
def test_no_more_images_than_a_chunk_are_evaluated_at_once_but_for_the_pair_of_a_pixel(chunk_size):
    sizes = []
    central_differences(lambda x: sizes.append(len(x)) or x.flatten(1), torch.zeros(1, 3, 3), chunk_size=chunk_size)
    assert max(sizes) <= max(2, chunk_size) and sum(sizes) == 18


def test_a_small_step_gives_what_backpropagation_gives():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 32, generator=generator, dtype=torch.float64)
    point = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    for function, tolerance in [
        (lambda x: x.flatten(1) @ weights.T, 1e-8),
        (lambda x: (x.flatten(1) @ weights.T / 4).tanh(), 1e-6),
    ]:
        differences = central_differences(function, point, step=1e-4)
        torch.testing.assert_close(differences, autograd_jacobian(function, point), rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk_size", [1, 2, 1000])
def test_the_exact_jacobian_of_a_quadratic_is_its_closed_form(chunk_size):
    function, point, jacobian = quadratic(5, (3, 2, 4))
    found = autograd_jacobian(function, point, chunk_size=chunk_size)
    assert not found.requires_grad
    torch.testing.assert_close(found, jacobian)


def test_the_step_reaches_beyond_a_kink_that_backpropagation_does_not_see():
    def kink(x):
        return (x.flatten(1) - 1).relu()

    point = torch.zeros(1, 1, 2)
    assert (autograd_jacobian(kink, point) == 0).all()
    torch.testing.assert_close(central_differences(kink, point, step=100.0), torch.eye(2) * 99 / 200)


def test_pixels_are_ordered_channel_row_column():
    point = torch.zeros(3, 2, 4)
    torch.testing.assert_close(central_differences(lambda x: x.flatten(1), point, chunk_size=5), torch.eye(24))
    torch.testing.assert_close(autograd_jacobian(lambda x: x.flatten(1), point), torch.eye(24))


def test_the_point_is_left_as_it_was_and_no_graph_is_kept():
    point = torch.randn(1, 3, 3)
    before = point.clone()
    layer = torch.nn.Linear(9, 2)
    assert not central_differences(lambda x: layer(x.flatten(1)), point).requires_grad
    assert torch.equal(point, before)
