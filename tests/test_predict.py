"""Relative sensitivity: closed forms, any way of computing it; how it ranks accuracies; and predict.py as a command."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import directional_bias
import predict
from predict import LEARNT, UNLEARNT, main, ranking, relative_sensitivity, squared_differences
from tests.helpers import refusal, rows
from utils import files, nads, tables, workers
from utils.directions import fourier_direction, fourier_map, random_direction

SMALL = "--image-size 8 --device cpu --arch".split()
TINY, SAMPLED = "tests.tiny_networks:plain", "tests.tiny_networks:ends_in_convolution"
LINEAR = f"{__name__}:sees_one_direction"
SEEN = fourier_direction(2, 1, size=8)
RANDOM = torch.randn(64, 63, generator=torch.Generator().manual_seed(0))
BASIS = torch.linalg.qr(torch.column_stack([SEEN.flatten(), RANDOM]))[0].T.reshape(64, 1, 8, 8)  # ±SEEN, and others


def start(folder, *options, arch=TINY):
    main([*SMALL, arch, *map(str, options), "--output", str(folder)])
    return [float(row["sensitivity"]) for row in rows(folder / "predicted.csv")]


def sensitivity_to(directions, arch, **options):
    return relative_sensitivity(*squared_differences(directions, arch=arch, **options))


def sees_one_direction(num_classes, weight=1.0):
    """A linear network that sees an image's coefficient along SEEN and no more."""
    body = nn.Linear(64, 1)
    body.weight.data = weight * SEEN.view(1, 64)
    return nn.Sequential(nn.Flatten(), body, nn.Linear(1, num_classes))


def blind(num_classes):
    return sees_one_direction(num_classes, 0.0)


def convolution():
    """A linear network that does not end in a linear layer: it is sampled whole."""
    return nn.Sequential(nn.Conv2d(1, 1, 8), nn.Flatten())


# --- Closed forms


def test_a_linear_network_is_sensitive_to_its_weight_by_the_dimension_and_to_nothing_else():
    found = sensitivity_to(BASIS, LINEAR, num_networks=20)  # 1,280 random directions, each of 1 ± √2 by 64
    assert found[0] == pytest.approx(64, rel=0.2) and found[1:] == pytest.approx(np.zeros(63), abs=1e-3)


def test_logistic_regression_is_as_sensitive_to_every_direction():
    images = torch.stack(list(fourier_map(8).values()))
    assert sensitivity_to(images, "logreg") == pytest.approx(np.ones(len(images)), abs=1e-5)  # its layer integrated out
    sampled = sensitivity_to(images, f"{__name__}:convolution", num_networks=500)
    assert sampled == pytest.approx(np.ones(len(images)), abs=0.3)  # 5 standard errors


@pytest.mark.parametrize("arch", [TINY, SAMPLED])
def test_the_mean_over_random_directions_is_1_by_chunks_of_any_size(monkeypatch, arch):
    directions = torch.stack([random_direction((1, 8, 8), torch.Generator().manual_seed(seed)) for seed in range(99)])
    found = sensitivity_to(directions, arch, num_networks=10)
    assert found.mean() == pytest.approx(1, abs=0.1) and np.ptp(found) > 0.1
    monkeypatch.setitem(nads.CHUNK_PIXELS, "cpu", 7 * 64)
    assert sensitivity_to(directions, arch, num_networks=10) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("size", [8, 16])
def test_the_difference_of_the_classes_has_the_given_rms_over_the_pixels(monkeypatch, size):
    seen = []

    def look(network, point, **how):
        seen.append(how["step"] * how["directions"])
        return torch.ones(2, len(how["directions"]))

    monkeypatch.setattr(predict, "network_rows", look)
    directions = torch.stack(list(fourier_map(size).values()))
    assert sensitivity_to(directions, "logreg", num_networks=1, step=5.0) == pytest.approx(1)
    rms = seen[0].square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 5))


@given(*[st.lists(st.integers(0, 5), min_size=1, max_size=6)] * 2)
def test_auc_counts_the_pairs_in_the_right_order_and_half_of_the_ties(learnt, unlearnt):
    pairs = [(a > b) + (a == b) / 2 for a in learnt for b in unlearnt]
    accuracies = np.array([LEARNT + 1] * len(learnt) + [UNLEARNT] * len(unlearnt))
    found = ranking(np.array([*learnt, *unlearnt]), accuracies)
    assert found["auc"] == pytest.approx(np.mean(pairs))
    assert (found["largest_unlearnt"], found["smallest_learnt"]) == (max(unlearnt), min(learnt))


def test_without_learnt_directions_there_is_nothing_to_rank():
    found = ranking(np.arange(4.0), np.array([50.0, 50.0, 52.0, 55.0]))
    assert np.isnan(found["auc"]) and np.isnan(found["smallest_learnt"]) and found["largest_unlearnt"] == 3
    assert np.isnan(ranking(np.arange(4.0), np.full(4, 100.0))["spearman"])


# --- The command


def test_it_writes_and_draws_the_sensitivity_to_each_direction(tmp_path, capsys):
    found = start(tmp_path, "--num-networks", 2, arch=LINEAR)
    assert len(found) == 10 and max(found) < 1e-6  # (2, 1) is not on the map of even frequencies
    found = start(tmp_path, "--num-networks", 2, "--frequency", 2, 1, "--frequency", 2, 0, arch=LINEAR)
    assert found == pytest.approx([64, 0], rel=0.4, abs=1e-4)
    assert "relative sensitivity to 2 directions" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"predicted.csv", "predicted.png"}
    assert len(start(tmp_path / "random", "--directions", "random")) == 16


@pytest.mark.parametrize(("arch", "number"), [(TINY, 4), (SAMPLED, 200)])
def test_a_network_that_does_not_end_in_a_linear_layer_is_sampled(tmp_path, capsys, arch, number):
    start(tmp_path, "--frequency", 0, 2, arch=arch)
    assert f"untrained networks: {number}; on cpu" in capsys.readouterr().out


def test_the_folder_is_named_by_what_is_not_the_papers():
    folders = {"": "ResNet18-fourier", "--no-pooling --sigma 1 --directions nads": "ResNet18-nopooling-sigma1-nads"}
    for options, name in folders.items():
        assert predict.parse_arguments(["--arch", "resnet18", *options.split()]).output.as_posix().endswith(name)


def test_it_ranks_accuracies_beside_the_lower_frequency(tmp_path, capsys):
    args = predict.parse_arguments([*SMALL, TINY, "--output", str(tmp_path), "--against", "some.csv"])
    sensitivity = {(0, 0): 4.0, (-2, 0): 3.0, (-2, -2): 2.0, (-4, 0): 1.0}
    accuracies = [((0, 0), 90.0), ((2, 0), 50.0), ((-2, -2), 80.0), ((-4, 0), 52.0), ((0, 2), 99.0)]  # (0, 2): unknown
    predict.compare(sensitivity, "accuracy", accuracies, args)
    text = capsys.readouterr().out
    assert "against 4 directions of some.csv:\n2 learnt (above 75 %), 2 not (up to 55 %)\n" in text
    assert "relative sensitivity: AUC 0.750, rank" in text
    assert "easier: AUC 0.750" in text and "to unlearnt directions up to 3, to learnt ones from 2\n" in text
    assert (tmp_path / "predicted_and_accuracy.png").exists()


def test_it_reads_the_accuracies_of_a_run_and_published_ones(tmp_path, capsys, monkeypatch):
    run, options = tmp_path / "run", "--num-train 20 --num-test 20 --epochs 1 --frequency 0 0 --frequency 0 2".split()
    monkeypatch.setattr(workers, "num_cores", lambda: 1)
    directional_bias.main([*SMALL, TINY, *options, "--output", str(run)])
    start(tmp_path, "--against", run)
    assert f"against 2 directions of {run}:" in capsys.readouterr().out
    tables.write_rows(tmp_path / "theirs.csv", [{"frequency_y": 0, "frequency_x": 2, TINY: 60.0}])
    start(tmp_path, "--against", tmp_path / "theirs.csv")
    assert "against 1 directions of" in capsys.readouterr().out
    asked = [*SMALL, TINY, "--output", tmp_path / "no", "--against"]
    assert "sigma 3.0, not 2.0" in refusal(capsys, main, *asked, run, "--sigma", 2)
    assert "has no accuracies.csv" in refusal(capsys, main, *asked, tmp_path)
    assert "numbers in columns" in refusal(capsys, main, *asked, tmp_path / "theirs.csv", "--directions", "random")
    assert not (tmp_path / "no").exists()


def test_a_network_that_sees_nothing_is_refused(tmp_path, capsys):
    message = refusal(capsys, main, *SMALL, f"{__name__}:blind", "--output", tmp_path / "run")
    assert "do not see their input" in message and not (tmp_path / "run").exists()


def test_it_ranks_the_steps_of_a_run_and_what_is_never_learnt_comes_last(tmp_path, capsys):
    run = tmp_path / "run"
    options = "--frequency 0 0 --frequency 0 2 --frequency 2 2 --num-train 20 --num-test 20 --epochs 1 --measure steps"
    directional_bias.main([*SMALL, TINY, *options.split(), "--output", str(run), "--workers", "1"])
    for name, steps in {"0_0_0": "49", "0_-2_0": "70", "-2_-2_0": "nan"}.items():
        path = run / "items" / f"{name}.json"
        files.save_json(path, files.read_json(path) | {"steps": steps})
    directional_bias.main([*SMALL, TINY, *options.split(), "--output", str(run), "--workers", "1"])
    args = predict.parse_arguments([*SMALL, TINY, "--sigma", "0.5", "--against", str(run), "--output", str(tmp_path)])
    measure, values = predict.read_measured(run, args)
    assert measure == "steps" and dict(values) == {(0, 0): 49, (0, -2): 70, (-2, -2): math.inf}
    capsys.readouterr()
    predict.compare({(0, 0): 3.0, (0, -2): 2.0, (-2, -2): 1.0}, measure, values, args)
    assert "sensitivity: rank correlation with the steps -1.000, -1.000 among the 2 learnt" in capsys.readouterr().out
