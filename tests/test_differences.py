"""Central differences, against closed forms."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.differences import CHUNK_PIXELS, central_differences


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
    assert max(sizes) <= max(2, chunk_size) and sum(sizes) == 80  # the two images of a pixel stay together


def test_large_images_come_in_smaller_chunks():
    sizes = []
    central_differences(lambda x: sizes.append(len(x)) or x.mean((1, 2, 3))[:, None], torch.zeros(1, 128, 64), step=1.0)
    assert set(sizes) == {CHUNK_PIXELS["cpu"] // 8192}


def test_a_small_step_finds_the_gradient_of_backpropagation():
    function, point, _ = quadratic(5, (3, 2, 4))
    smooth = lambda x: function(x / 9).tanh()  # noqa: E731
    exact = torch.func.jacrev(lambda x: smooth(x[None])[0])(point).flatten(1)
    torch.testing.assert_close(central_differences(smooth, point, step=1e-4), exact, rtol=0, atol=1e-6)


def test_the_step_reaches_beyond_a_kink_that_backpropagation_does_not_see():
    found = central_differences(lambda x: (x.flatten(1) - 1).relu(), torch.zeros(1, 1, 2), step=100.0)
    torch.testing.assert_close(found, torch.eye(2) * 99 / 200)


def test_pixels_are_ordered_channel_row_column_and_the_result_is_of_the_points_type_without_a_graph():
    point, layer = torch.randn(3, 2, 4), torch.nn.Linear(24, 24)
    torch.nn.init.eye_(layer.weight)
    found = central_differences(lambda x: layer(x.flatten(1)).bfloat16(), point, step=128.0)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, torch.eye(24), rtol=0, atol=0.01)
