"""The benchmarks: measurements end, what they compute is right, and processes that begin late say so."""

import re

import numpy as np
import pytest
import torch

from benchmarks import measuring, nad_precision, table

MEASUREMENTS = {"train": (128, "bf16, no graphs"), "plain_gradient": (4,), "networks": (2,), "predicted_map": ()}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_warms_up_is_timed_and_may_give_numbers(monkeypatch, name):
    monkeypatch.setattr(measuring.training, "as_graphs", None)  # to be put back
    steps = getattr(measuring, name)("lenet", torch.device("cpu"), *MEASUREMENTS[name])
    next(steps)
    next(steps)
    numbers = next(steps, ())
    assert len(numbers) == 2 * (name == "networks") and all(number > 10 for number in numbers)


def test_a_network_with_independent_features_is_worth_about_their_number():
    rng, (features, pixels) = np.random.default_rng(0), (50, 64)
    rows = list(rng.standard_normal((40, features, pixels)) / features**0.5)
    for squared_norm in (None, pixels):  # C is the identity
        assert measuring.variance_reduction(rows, squared_norm) == pytest.approx(features + 0.8, rel=0.1)


@pytest.mark.parametrize(("bits", "mantissa"), [(13, 10), (16, 7)])
def test_numbers_are_rounded_to_so_many_bits(bits, mantissa):
    x = torch.randn(1000)
    rounded = nad_precision.drop_bits(x, bits)
    assert torch.equal(nad_precision.drop_bits(rounded, bits), rounded) and not torch.equal(rounded, x)
    assert ((rounded - x).abs() <= 2.0 ** -(mantissa + 1) * x.abs()).all()
    if bits == 16:
        assert torch.equal(rounded, x.bfloat16().float())


def test_tf32_adds_more_noise_than_fp32_and_less_than_bf16():
    point = measuring.draw_point()
    exact, *others = (nad_precision.differences("lenet", kind, point) for kind in nad_precision.DROPPED_BITS)
    noise = [((values - exact).square().mean() / exact.square().mean()).sqrt().item() for values in others]
    assert noise[0] < 1e-5 < noise[1] < 0.01 < noise[2] < 0.1


@pytest.mark.slow
def test_the_table_has_a_row_for_each_measurement_and_late_processes_say_so(capfd):
    command = "--arch lenet --steps 2 --networks 2 --processes 2 --warm-up 0.1 --device cpu"
    table.main(command.split())
    out, errors = capfd.readouterr()
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| LeNet")]
    what = [
        "a training, fp32",
        "a training, bf16",
        "a map: by training, and predicted",
        "NADs: a gradient, and a network",
    ]
    assert [row[2] for row in rows[:4]] == what and len(rows) == 6
    for row in rows:
        plain, ours, gained = (float(cell.replace(",", "")) for cell in row[3:])
        assert gained == pytest.approx(plain / ours, rel=0.1, abs=0.05) and min(plain, ours) > 0
    assert len(re.findall(r"a process begins \d+\.\d s late: use a longer --warm-up", errors)) == 6
