"""The benchmarks: measurements end, what they compute is right, and processes that begin late say so."""

import re

import numpy as np
import pytest
import torch

from benchmarks import measuring, nad_precision, table

MEASUREMENTS = {"train": (128, "fp32, no graphs"), "plain_gradient": (4,), "networks": (2,), "predicted_map": ()}


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


def test_bf16_is_emulated_and_tf32_keeps_three_bits_more():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))  # no number lies half-way between two
    assert torch.equal(nad_precision.drop_bits(x, 16), x.bfloat16().float())
    assert ((nad_precision.drop_bits(x, 13) - x).abs() <= 2.0**-11 * x.abs()).all()


def test_tf32_adds_more_noise_than_fp32_and_less_than_bf16():
    point = measuring.draw_point()
    exact, *others = (nad_precision.differences("lenet", kind, point) for kind in nad_precision.DROPPED_BITS)
    noise = [((values - exact).square().mean() / exact.square().mean()).sqrt().item() for values in others]
    assert noise[0] < 1e-5 < noise[1] < 0.01 < noise[2] < 0.1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # a DataLoader's workers, from Python 3.12 on
def test_the_table_has_a_row_for_each_measurement(monkeypatch, capsys):
    monkeypatch.setattr(measuring.training, "as_graphs", None)  # to be put back
    monkeypatch.setattr(table, "in_processes", lambda number, warm_up, *args: measuring._timed(1, 0, *args))
    table.main("--arch lenet --steps 2 --networks 2 --device cpu".split())
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "LeNet |" in line]
    what = ["a training, fp32", "a training, bf16", "a map: by training, and predicted"]
    assert [line[2] for line in lines[:3]] == what and len(lines) == 6
    for line in lines:
        plain, ours, gained = (float(cell.replace(",", "")) for cell in line[3:])
        assert gained == pytest.approx(plain / ours, rel=0.1, abs=0.05) and min(plain, ours) > 0


@pytest.mark.slow
def test_processes_that_cannot_begin_together_say_so(capfd):
    assert measuring.in_processes(2, 0.01, measuring.predicted_map, "lenet", torch.device("cpu"))[0] > 0
    assert len(re.findall(r"a process begins \d+\.\d s late: use a longer --warm-up", capfd.readouterr().err)) == 2
