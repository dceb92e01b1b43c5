"""What untrained networks tell of directions: closed forms, any way of computing it, and --predict as a command."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import directional_bias
from directional_bias import NUM_NETWORKS, auc, compare_prediction, main, parse_arguments, share, variance_along
from tests.helpers import refusal, rows, run_on_ranks
from utils import differences, runs
from utils.directions import fourier_direction, fourier_map, random_direction

SMALL = "--image-size 8 --num-train 60 --num-test 200 --epochs 2 --batch-size 16 --device cpu --arch".split()
TINY, SAMPLED = "tests.tiny_networks:plain", "tests.tiny_networks:ends_in_convolution"
LINEAR = f"{__name__}:sees_one_direction"
pytestmark = pytest.mark.usefixtures("one_process")
SEEN = fourier_direction(2, 1, size=8)
RANDOM = torch.randn(64, 63, generator=torch.Generator().manual_seed(0))
BASIS = torch.linalg.qr(torch.column_stack([SEEN.flatten(), RANDOM]))[0].T.reshape(64, 1, 8, 8)  # ±SEEN, and others


def start(folder, *options, arch=TINY):
    main([*SMALL, arch, *map(str, options), "--output", str(folder)])
    predicted = folder / "predicted.csv"
    return [float(row["share"]) for row in rows(predicted)] if predicted.exists() else []


def shares_of(directions, arch, **options):
    return share(*variance_along(directions, arch=arch, **options))


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


def test_along_its_weight_the_share_of_a_linear_network_is_the_dimension_and_elsewhere_0():
    shares = shares_of(BASIS, LINEAR, num_networks=20)  # 1,280 random directions, of which each sees 1 ± √2 by 64
    assert shares[0] == pytest.approx(64, rel=0.2) and shares[1:] == pytest.approx(np.zeros(63), abs=1e-3)


def test_logistic_regression_prefers_nothing():
    images = torch.stack(list(fourier_map(8).values()))
    assert shares_of(images, "logreg") == pytest.approx(np.ones(len(images)), abs=1e-5)  # exactly, its layer integrated
    sampled = shares_of(images, f"{__name__}:convolution", num_networks=500)
    assert sampled == pytest.approx(np.ones(len(images)), abs=0.3)  # 5 standard errors


@pytest.mark.parametrize("arch", [TINY, SAMPLED])
def test_the_mean_share_of_random_directions_is_1_by_chunks_of_any_size(monkeypatch, arch):
    directions = torch.stack([random_direction((1, 8, 8), torch.Generator().manual_seed(seed)) for seed in range(99)])
    shares = shares_of(directions, arch, num_networks=10)
    assert shares.mean() == pytest.approx(1, abs=0.1) and np.ptp(shares) > 0.1
    monkeypatch.setitem(differences.CHUNK_PIXELS, "cpu", 7 * 64)
    assert shares_of(directions, arch, num_networks=10) == pytest.approx(shares, rel=1e-4)


@pytest.mark.parametrize("size", [8, 16])
def test_networks_are_shown_both_classes_at_a_step_of_given_rms_over_the_pixels(monkeypatch, size):
    seen = []
    look = lambda network, point, **how: seen.append(how) or torch.ones(2, len(how["directions"]))  # noqa: E731
    monkeypatch.setattr(directional_bias, "network_rows", look)
    directions = torch.stack(list(fourier_map(size).values()))
    assert shares_of(directions, "logreg", num_networks=1, step=5.0) == pytest.approx(1)
    rms = (seen[0]["step"] * seen[0]["directions"]).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 5))
    torch.testing.assert_close(seen[0]["directions"][: len(directions)], directions)


@pytest.mark.parametrize(("arch", "estimator"), [(TINY, "marginal"), (SAMPLED, "sampled")])
def test_a_network_that_does_not_end_in_a_linear_layer_is_sampled(tmp_path, capsys, arch, estimator):
    start(tmp_path, "--predict", arch=arch)
    text, number = capsys.readouterr().out, NUM_NETWORKS[estimator]
    assert f"untrained networks: {number}, 0 of them done; cpu (" in text and f" ({number} networks, " in text


@given(*[st.lists(st.integers(0, 5), min_size=1, max_size=6)] * 2)
def test_auc_counts_the_pairs_in_the_right_order_and_half_of_the_ties(learnt, unlearnt):
    pairs = [(a > b) + (a == b) / 2 for a in learnt for b in unlearnt]
    accuracies = np.array([80.0] * len(learnt) + [50.0] * len(unlearnt))
    assert auc(np.array([*learnt, *unlearnt]), accuracies) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(np.array(learnt), np.full(len(learnt), 80.0)))


# --- The command


def test_the_command_writes_and_draws_the_share_of_each_direction(tmp_path, capsys):
    found = start(tmp_path, "--predict", 2, arch=LINEAR)
    assert len(found) == 10 and max(found) < 1e-6  # (2, 1) is not on the map of even frequencies
    found = start(tmp_path, "--predict", 2, "--frequency", 2, 1, "--frequency", 2, 0, arch=LINEAR)
    assert found == pytest.approx([64, 0], rel=0.4, abs=1e-4)
    text = capsys.readouterr().out
    assert "share of 2 directions" in text and "1 get less than 0.5 (2 networks" in text
    assert {path.name for path in tmp_path.iterdir()} == {"predicted.csv", "predicted.png"}
    assert len(start(tmp_path / "random", "--directions", "random", "--predict")) == 16


def test_a_network_that_sees_nothing_is_refused(tmp_path, capsys):
    argv = [f"{__name__}:blind", "--predict", "--output", tmp_path / "run"]
    assert "untrained networks are blind to their input" in refusal(capsys, main, *SMALL, *argv)
    assert not (tmp_path / "run").exists()


def test_a_prediction_comes_before_beside_or_after_a_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(directional_bias, "LEARNT", 50.0)  # so that some of these cells are learnt and some are not
    monkeypatch.setattr(directional_bias, "UNLEARNT", 50.0)
    start(tmp_path, "--predict")
    assert "prediction against" not in capsys.readouterr().out
    start(tmp_path)
    (said,) = [line for line in capsys.readouterr().out.split("\n") if line.startswith("prediction against trained")]
    trained, settings = rows(tmp_path), directional_bias.settings(parse_arguments([*SMALL, TINY]))
    with runs.open_run(tmp_path, settings, torch.device("cpu")):
        start(tmp_path, "--predict")
    assert said in capsys.readouterr().out.split("\n") and "AUC 0." in said and rows(tmp_path) == trained
    start(tmp_path, "--predict", "--precision", "bf16", "--max-lr", 0.1)  # of which no share depends
    assert said in capsys.readouterr().out
    message = refusal(capsys, main, *SMALL, TINY, "--sigma", 2, "--predict", "--output", tmp_path)
    assert "sigma was 3.0, now 2.0" in message
    start(tmp_path)
    assert "of this folder's prediction, by 4 untrained networks:" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["--seed 1", "--sigma 2", "--phase sine", "--directions random --sigma 3"])
def test_a_prediction_by_other_settings_is_not_held_against_a_training(tmp_path, capsys, other):
    start(tmp_path, "--predict", *other.split())
    start(tmp_path)
    assert "prediction against" not in capsys.readouterr().out


def test_shares_rank_accuracies_beside_the_lower_frequency(tmp_path, capsys):
    args = parse_arguments([*SMALL, TINY, "--output", str(tmp_path)])
    shares = {(0, 0): 4.0, (-2, 0): 3.0, (-2, -2): 2.0, (-4, 0): 1.0}
    accuracies = [((0, 0), 90.0), ((2, 0), 50.0), ((-2, -2), 80.0), ((-4, 0), 52.0), ((0, 2), 99.0)]  # (0, 2): no share
    compare_prediction(shares, accuracies, "published", args)
    said = "prediction against published accuracies: 2 of 4 above 75 %, 2 at 55 % and below; AUC 0.750 "
    said += "(by “the lower the frequency, the easier”: 0.750), Spearman 0.400; "
    assert capsys.readouterr().out == said + "shares of the unlearnt up to 3, of the learnt from 2\n"
    assert (tmp_path / "predicted_and_published.png").exists()
    compare_prediction(shares, [(key, 50.0) for key in shares], "trained", args)
    assert "0 of 4 above 75 %, 4 at 55 % and below, so there is nothing to rank" in capsys.readouterr().out


def test_of_two_ranks_the_first_predicts_alone_and_as_one_does(tmp_path):
    options = [*SMALL, TINY, "--predict", 3, "--output", "two"]
    out, _ = run_on_ranks("directional_bias", *options, folder=tmp_path)
    assert "ranks: 1" in out and out.count("figure: ") == 1
    one, two = start(tmp_path / "one", "--predict", 3), rows(tmp_path / "two" / "predicted.csv")
    two = [float(row["share"]) for row in two]
    assert two == pytest.approx(one, rel=1e-5) and np.ptp(one) > 0.1
