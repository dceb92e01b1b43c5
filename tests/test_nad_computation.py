"""Experiment 2: the estimators against closed forms and each other; runs shared by ranks, cut short and continued."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nad_computation
from models import build_model, paper_name
from nad_computation import NUM_NETWORKS, ROOT, add_network, compute_nads, draw_network, look_points, nothing_drawn
from utils import distributed
from utils.covariance import NADs, log_variance_correlation, subspace_overlap
from utils.directions import load_array, load_nads
from utils.operations import forward_flops

TINY = "tests.tiny_networks"
PLAIN = f"{TINY}:plain"


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Keep `main` in this process."""
    monkeypatch.setattr(distributed, "num_cores", lambda: 1)


def arguments(folder, *options, arch=PLAIN, size=8):
    """A small run's command line; later options win."""
    return [
        "--arch", arch, "--image-size", str(size), "--checkpoints", str(folder), "--k", "1", "--device", "cpu",
        *map(str, options),
    ]  # fmt: skip


def arrays(folder):
    """The directions, the singular values and the JSON of the run in a folder."""
    (path,) = folder.glob("*_NADs.npy")
    name = str(path).removesuffix("_NADs.npy")
    return np.load(path), np.load(f"{name}_eigenvals.npy"), json.loads(Path(f"{name}_NADs.json").read_text())


def assert_same(a, b, atol=1e-6):
    """Equal arrays and weight variance, and as many networks."""
    (rows_a, values_a, about_a), (rows_b, values_b, about_b) = map(arrays, (a, b))
    assert about_a["num_networks"] == about_b["num_networks"]
    if about_a["weight_variance"] is not None:
        assert about_a["weight_variance"] == pytest.approx(about_b["weight_variance"], rel=1e-9)
    np.testing.assert_allclose(rows_a, rows_b, rtol=0, atol=atol)
    np.testing.assert_allclose(values_a, values_b, rtol=atol, atol=atol * values_a[0])


def refusal(capsys, *argv):
    """The one line on stderr with which a command ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        nad_computation.main([*map(str, argv)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert len([line for line in error.splitlines() if line and "networks of rank 0" not in line]) == 1, error
    return error


def estimates(arch, estimator, numbers, size=8):
    """Each network's own estimate of the covariance, (N, D, D), not centred."""
    point = nad_computation.draw_point("normal", image_size=size)
    for number in numbers:
        drawn = nothing_drawn(point.numel())
        add_network(drawn, number, point, arch=arch, estimator=estimator)
        outer = drawn.halves[number % 2].outer
        number, *_, fan_ins = drawn.weights.tolist()
        yield outer / (3 * fan_ins / number) if number else outer


# --- networks and points


def test_a_network_depends_on_its_seed_and_number_alone():
    def weights(number, seed=0):
        return draw_network("lenet", number, seed=seed, image_size=16).fc3.weight

    first = weights(3)
    torch.randn(7)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first) and not torch.equal(weights(3, seed=1), first)


def test_a_network_has_one_output_is_in_evaluation_mode_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    network = draw_network("vgg11", 0, image_size=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in network.modules())
    assert network.classifier[-1].out_features == 1 and not any(p.requires_grad for p in network.parameters())


def test_the_point_is_standard_normal_or_grey_and_follows_the_seed():
    x = nad_computation.draw_point("normal", num_channels=3)
    assert x.shape == (3, 32, 32) and abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert torch.equal(x, nad_computation.draw_point("normal", num_channels=3))
    assert not torch.equal(x, nad_computation.draw_point("normal", seed=1, num_channels=3))
    assert not nad_computation.draw_point("zero", image_size=8).any()


# --- closed forms


@pytest.mark.parametrize(("num_channels", "image_size"), [(1, 16), (3, 6)])
@pytest.mark.parametrize("jacobian", ["differences", "autograd"])
def test_the_marginal_covariance_of_a_linear_model_is_exactly_isotropic(num_channels, image_size, jacobian):
    nads, drawn = compute_nads(
        "logreg", num_networks=3, num_channels=num_channels, image_size=image_size, jacobian=jacobian
    )
    dimension = num_channels * image_size**2
    covariance = 3 * dimension * drawn.covariance()
    torch.testing.assert_close(covariance, torch.eye(dimension, dtype=torch.float64), rtol=0, atol=1e-6)
    np.testing.assert_allclose(nads.singular_values, np.sqrt(9999 / (3 * dimension)), rtol=1e-6)


def test_the_sampled_covariance_of_a_linear_model_is_isotropic_within_its_sampling_error():
    number, dimension = 1000, 64
    nads, drawn = compute_nads("logreg", estimator="sampled", num_networks=number, image_size=8)
    excess = 3 * dimension * drawn.covariance().numpy() - np.eye(dimension)
    standard_error = np.where(np.eye(dimension), 0.8**0.5, 1) / number**0.5  # of w² and of w·w' for uniform weights
    z = (excess / standard_error)[np.triu_indices(dimension)]
    assert np.abs(z).max() < 5 and abs(np.mean(z**2) - 1) < 0.15
    edges = np.sqrt(9999 / (3 * dimension)) * (1 + np.array([1, -1]) * np.sqrt(dimension / number))  # Marchenko-Pastur
    np.testing.assert_allclose(nads.singular_values[[0, -1]], edges, rtol=0.03)


@pytest.mark.parametrize(
    ("arch", "fan_in"), [("lenet", 84), (f"{TINY}:ten_outputs", 16), (f"{TINY}:reparametrised_head", 16)]
)
def test_an_untouched_last_layer_has_the_variance_of_its_initialisation_exactly(arch, fan_in):
    _, drawn = compute_nads(arch, num_networks=3, image_size=16 if arch == "lenet" else 8)
    assert nad_computation.weight_variance(drawn.weights) == 1 / (3 * fan_in)


def test_a_last_layer_initialised_otherwise_has_the_variance_of_the_drawn_weights():
    arch, number = f"{TINY}:small_normal_head", 50
    _, drawn = compute_nads(arch, num_networks=number, image_size=8)
    weights = torch.cat([draw_network(arch, n, image_size=8).head.weight.double().flatten() for n in range(number)])
    variance = nad_computation.weight_variance(drawn.weights)
    assert variance == pytest.approx(weights.square().mean().item(), rel=1e-12)
    assert variance == pytest.approx(1e-4, rel=4 * (2 / len(weights)) ** 0.5)


# --- the two estimators


@pytest.fixture(scope="module")
def both():
    """Estimates of the tiny network's covariance by both estimators, from different networks: (N, D²) each."""
    number = 600
    marginal = torch.stack([*estimates(PLAIN, "marginal", range(number))])
    sampled = torch.stack([*estimates(PLAIN, "sampled", range(number, 2 * number))])
    return marginal, sampled


def test_the_marginal_estimate_is_the_mean_of_many_sampled_ones_within_the_sampling_error(both):
    difference = both[0].mean(0) - both[1].mean(0)
    error = (both[0].var(0) / len(both[0]) + both[1].var(0) / len(both[1])).sqrt()
    z = (difference / error)[torch.triu_indices(*difference.shape).unbind()]
    assert z.abs().max() < 6 and abs(z.square().mean() - 1) < 0.5
    # along the main directions, where a wrong σ_w² would show most
    directions = torch.linalg.eigh(both[1].mean(0)).eigenvectors[:, -8:]
    along = [torch.einsum("nij,ik,jk->nk", each, directions, directions) for each in both]
    error = sum(each.var(0) / len(each) for each in along).sqrt()
    assert ((along[0].mean(0) - along[1].mean(0)).abs() < 4.5 * error).all()


def test_a_marginal_network_is_worth_several_sampled_ones(both):
    spread = [(each - each.mean(0)).square().sum((1, 2)).mean() for each in both]
    assert spread[1] > 4 * spread[0]
    few = [(each[:50].mean(0) - both[0].mean(0)).norm() for each in (both[0][300:], both[1])]
    assert few[0] < few[1]


def test_the_marginal_estimate_of_one_trunk_is_the_covariance_over_its_last_weights():
    point = nad_computation.draw_point("normal", image_size=8)
    trunk, layer = nad_computation.split_last_linear(draw_network(PLAIN, 5, image_size=8), point)
    with torch.no_grad():
        features = trunk(point[None])
        whole = draw_network(PLAIN, 5, image_size=8)(point[None])
        torch.testing.assert_close(layer(features), whole)
    assert features.shape == (1, layer.in_features)


def test_autograd_is_the_limit_of_a_small_step_and_not_the_step_of_100():
    options = {"num_networks": 8, "image_size": 8}
    exact, _ = compute_nads(PLAIN, jacobian="autograd", **options)
    small, _ = compute_nads(PLAIN, step=1e-3, **options)
    large, _ = compute_nads(PLAIN, **options)
    np.testing.assert_allclose(small.singular_values[:20], exact.singular_values[:20], rtol=1e-2)
    assert not np.allclose(large.singular_values[:20], exact.singular_values[:20], rtol=5e-2)


def test_autograd_goes_through_pooling():
    nads, _ = compute_nads("lenet", jacobian="autograd", num_networks=2, image_size=16, chunk_size=7)
    assert nads.directions.shape == (256, 256) and nads.singular_values[0] > 0


def test_bf16_keeps_the_first_directions():
    options = {"num_networks": 20, "image_size": 8}
    exact, rounded = (compute_nads(PLAIN, precision=p, **options)[0] for p in ("fp32", "bf16"))
    assert not np.array_equal(exact.directions, rounded.directions)
    assert subspace_overlap(exact.directions, rounded.directions, 5) > 0.99


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 10_000])
def test_the_covariance_does_not_depend_on_the_chunk_size(chunk_size):
    covariances = [
        compute_nads("lenet", num_networks=2, image_size=16, chunk_size=size)[1].covariance()
        for size in (32, chunk_size)
    ]
    assert (covariances[0] - covariances[1]).norm() < 1e-6 * covariances[0].norm()


def test_the_two_halves_are_the_even_and_the_odd_networks():
    _, drawn = compute_nads(PLAIN, num_networks=5, image_size=8)
    parts = [*estimates(PLAIN, "marginal", range(5))]
    torch.testing.assert_close(drawn.covariance((0,)), sum(parts[0::2]) / 3)
    torch.testing.assert_close(drawn.covariance((1,)), sum(parts[1::2]) / 2)
    torch.testing.assert_close(drawn.covariance(), sum(parts) / 5)
    assert drawn.agreement(64) == pytest.approx(1) and 0 < drawn.agreement(3) < 1


# --- refusals


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("ends_in_convolution", "this network does not end in one"),
        ("ends_in_relu", "this network does not end in one"),
        ("ends_in_relu_in_place", "this network does not end in one"),
        ("ends_in_clamp", "this network does not end in one"),
        ("linear_on_tokens", "this network does not end in one"),
        ("mean_of_tokens", "this network does not end in one"),
        ("zero_head", "weights of the last linear layer are all zero"),
        ("positive_head", "the mean of its weights is 0.0"),
        ("constant_head_of_16", "the mean of its weights is 0.1, not zero"),  # seen over several networks only
        ("tied_weights", "shares its weights (head.weight, gate.weight)"),
        ("used_twice", "shares its weights (head.weight)"),
        ("nan_weights", "is not a finite tensor"),
        ("nan_head", "is not a finite tensor"),
        ("returns_a_pair", "is not a finite tensor"),
    ],
)
def test_what_the_marginal_estimator_cannot_take_is_refused_in_one_line(tmp_path, capsys, network, words):
    command = arguments(tmp_path / "run", "--num-networks", 6, arch=f"{TINY}:{network}")
    assert words in refusal(capsys, *command)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("ten_outputs", "has 10 outputs: the sampled estimator needs a network of one"),
        ("nan_weights", "is not a finite tensor"),
        ("zero_head", "the input gradients of all networks of"),
    ],
)
def test_what_the_sampled_estimator_cannot_take_is_refused_in_one_line(tmp_path, capsys, network, words):
    command = arguments(tmp_path / "run", "--num-networks", 4, "--estimator", "sampled", arch=f"{TINY}:{network}")
    assert words in refusal(capsys, *command)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("network", ["ends_in_convolution", "ends_in_relu", "mean_of_tokens", "tied_weights"])
def test_the_sampled_estimator_takes_what_the_marginal_one_refuses(network):
    nads, _ = compute_nads(f"{TINY}:{network}", estimator="sampled", num_networks=20, image_size=8)
    assert nads.singular_values[0] > 0


def test_differences_that_are_not_finite_are_refused_with_the_networks_number(tmp_path, capsys):
    error = refusal(capsys, *arguments(tmp_path / "run", "--num-networks", 4, "--step", 1e39, arch="logreg"))
    assert "the differences of network 0 of logreg are not finite (step 1e+39)" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k", "65"], "--k 65 exceeds the input dimension 64"),
        (["--agreement-k", "65"], "--agreement-k 65 exceeds the input dimension 64"),
        (["--num-networks", "0"], "'0' is not a positive whole number"),
        (["--estimator", "sampled", "--num-networks", "1"], "--num-networks 1 has no covariance"),
        (["--step", "0"], "'0' is not a positive number"),
        (["--step", "nan"], "'nan' is not a positive number"),
        (["--chunk-size", "0"], "'0' is not a positive whole number"),
        (["--until-agreement", "1.5"], "'1.5' is not a number above 0, at most 1"),
        (["--point", "one"], "invalid choice: 'one'"),
        (["--precision", "tf32"], "precision tf32 needs a CUDA device"),
        (["--arch", "lenett"], "unknown architecture 'lenett'"),
        (["--arch", "lenet"], "LeNet needs images of at least 16x16"),
        (["--arch", f"{TINY}:none"], "has no 'none'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_anything_is_written(tmp_path, capsys, options, words):
    assert words in refusal(capsys, *arguments(tmp_path / "run"), *options)
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_settings_is_not_continued(tmp_path, capsys):
    command = arguments(tmp_path / "run", "--num-networks", 4)
    nad_computation.main(command)
    before = arrays(tmp_path / "run")[0]
    error = refusal(capsys, *command, "--step", 10, "--seed", 1)
    assert "seed was 0, now 1; step was 100.0, now 10.0" in error
    np.testing.assert_array_equal(arrays(tmp_path / "run")[0], before)


def test_fewer_networks_than_are_done_are_refused(tmp_path, capsys):
    nad_computation.main(arguments(tmp_path / "run", "--num-networks", 6))
    error = refusal(capsys, *arguments(tmp_path / "run", "--num-networks", 5))
    assert "has networks up to number 5: ask for 6 or more" in error


def test_a_corrupt_checkpoint_is_refused_by_name(tmp_path, capsys):
    command = arguments(tmp_path / "run", "--num-networks", 4)
    nad_computation.main(command)
    part = tmp_path / "run" / "part-0.pt"
    good, state = part.read_bytes(), torch.load(part)
    for content in (b"", b"not a checkpoint", good[: len(good) // 2]):
        part.write_bytes(content)
        assert f"{part} cannot be read" in refusal(capsys, *command)
    for other in (
        {},
        [1, 2],
        state | {"numbers": [0, 1]},
        state | {"numbers": None},
        state | {"halves": [torch.zeros(6, 4)] * 2},
        state | {"halves": [torch.tensor(1.0)] * 2},
        state | {"halves": state["halves"][:1]},
    ):
        torch.save(other, part)
        assert f"the checkpoint {part} does not hold what it should" in refusal(capsys, *command)


# --- the command


def test_the_command_writes_arrays_their_description_and_a_figure(tmp_path, capsys):
    output = tmp_path / "arrays"
    nad_computation.main(arguments(tmp_path / "run", "--num-networks", 20, "--agreement-k", 3, "--output", output))
    rows, values, about = arrays(output)
    assert {path.name for path in output.iterdir()} == {
        f"{paper_name(PLAIN)}_{end}" for end in ("NADs.npy", "NADs.json", "eigenvals.npy")
    }
    assert (tmp_path / "run" / "nads.png").read_bytes().startswith(b"\x89PNG")
    assert rows.shape == (64, 64) and rows.dtype == values.dtype == np.float32
    nads, drawn = compute_nads(PLAIN, num_networks=20, image_size=8)
    np.testing.assert_array_equal(rows, nads.directions)
    np.testing.assert_array_equal(values, nads.singular_values.astype(np.float32))
    assert about.pop("versions").keys() >= {"python", "torch", "numpy"}
    agreement = round(drawn.agreement(3), 4)
    assert about == {
        "arch": PLAIN, "estimator": "marginal", "num_channels": 1, "image_size": 8, "point": "normal", "seed": 0,
        "step": 100.0, "jacobian": "differences", "precision": "fp32", "device": "cpu",
        "num_networks": 20, "agreement": {"k": 3, "split_half_overlap": agreement}, "weight_variance": 1 / 48,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert f"20 networks; two halves agree to {agreement:.3f} on the first 3 directions" in out
    assert "closer to the truth" in out and "rotate freely" in out


def test_a_variant_is_labelled_and_colour_images_are_flattened_rows(tmp_path):
    options = ["--num-channels", 3, "--point", "zero", "--jacobian", "autograd", "--estimator", "sampled"]
    nad_computation.main(arguments(tmp_path, *options, "--precision", "bf16", "--num-networks", 4, size=6))
    rows, values, about = arrays(tmp_path)
    assert rows.shape == (108, 108) and values.shape == (108,)
    assert rows.reshape(-1, 3, 6, 6).shape == (108, 3, 6, 6)
    labels = {key: about[key] for key in ("point", "jacobian", "estimator", "precision", "weight_variance")}
    assert labels == {
        "point": "zero", "jacobian": "autograd", "estimator": "sampled", "precision": "bf16", "weight_variance": None
    }  # fmt: skip


def test_the_defaults_are_the_papers():
    args = nad_computation.parse_arguments([])
    assert (args.arch, args.step, args.point, args.jacobian, args.image_size) == (
        "lenet", 100, "normal", "differences", 32,
    )  # fmt: skip
    assert (args.estimator, args.num_networks, args.agreement_k, args.num_channels) == ("marginal", 1000, 100, 1)
    assert nad_computation.parse_arguments(["--estimator", "sampled"]).num_networks == NUM_NETWORKS["sampled"] == 10_000


# --- runs that are continued


@pytest.mark.parametrize("estimator", ["marginal", "sampled"])
def test_more_networks_added_later_give_the_same_as_all_at_once(tmp_path, estimator):
    for number in (4, 7, 10):
        nad_computation.main(arguments(tmp_path / "later", "--estimator", estimator, "--num-networks", number))
    nad_computation.main(arguments(tmp_path / "once", "--estimator", estimator, "--num-networks", 10))
    assert_same(tmp_path / "later", tmp_path / "once", atol=0)
    nad_computation.main(arguments(tmp_path / "once", "--estimator", estimator, "--num-networks", 10))  # nothing to do
    assert_same(tmp_path / "later", tmp_path / "once", atol=0)


SLOWLY = """
import sys, time
import nad_computation
from utils import distributed
nad_computation.CHECKPOINT_SECONDS = -1
distributed.num_cores = lambda: 1
plain = nad_computation.add_network
nad_computation.add_network = lambda *args, **kwargs: (time.sleep(0.1), plain(*args, **kwargs))
nad_computation.main(sys.argv[1:])
"""


def test_a_killed_run_continues_to_the_very_same_arrays(tmp_path):
    command = arguments(tmp_path / "killed", "--num-networks", 40)
    part = tmp_path / "killed" / "part-0.pt"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", SLOWLY, *command], cwd=ROOT, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 600
        while not part.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert 0 < len(torch.load(part)["numbers"]) < 40
    nad_computation.main(command)
    nad_computation.main(arguments(tmp_path / "whole", "--num-networks", 40))
    assert_same(tmp_path / "killed", tmp_path / "whole", atol=0)


# --- The estimate


def test_a_dry_run_of_the_exact_jacobian_counts_a_backward_pass_a_feature(tmp_path, capsys):
    arch = f"{TINY}:ten_outputs"
    nad_computation.main(arguments(tmp_path / "run", "--jacobian", "autograd", "--dry-run", arch=arch))
    passes = 1 + 2 * 16  # of two each, for 16 features and not for 160 weights
    flops = passes * forward_flops(build_model(arch, 1, 1, 8), (1, 8, 8))
    assert f"operations: {flops:.2e} each" in capsys.readouterr().out


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(tmp_path, capsys):
    nad_computation.main(arguments(tmp_path / "run", "--num-networks", 3, arch="logreg"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    nad_computation.main(arguments(tmp_path / "run", "--num-networks", 10, "--dry-run", arch="logreg"))
    printed = capsys.readouterr().out
    assert printed.startswith("10 networks of LogReg, 3 of them done; 7 to do on 1 rank\n")
    assert f"operations: {2 * 64 * 2 * 64:.2e} each" in printed  # a product of 64 for each of 2·64 images
    assert "estimated time here: 0:00:0" in printed
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    message = refusal(capsys, *arguments(tmp_path / "run", "--step", 1, "--dry-run", arch="logreg"))
    assert "step was 100.0, now 1.0" in message
    nad_computation.main(arguments(tmp_path / "new", "--dry-run"))
    assert not (tmp_path / "new").exists()


# --- agreement


@given(number=st.integers(1, 20_000), other=st.integers(1, 20_000))
def test_agreement_is_looked_at_at_the_same_counts_whatever_the_number_of_networks(number, other):
    looks = [*look_points(number)]
    assert looks[-1] == number and looks == sorted(set(looks))
    fixed = {factor * 2**power for factor in (16, 24) for power in range(12)}
    assert set(looks[:-1]) == {count for count in fixed if count < number}
    smaller = min(number, other)
    assert [n for n in look_points(other) if n < smaller] == [n for n in looks if n < smaller]


AGREE = ("--until-agreement", 0.6, "--agreement-k", 16)


def test_a_run_until_agreement_stops_at_the_first_look_that_has_it(tmp_path):
    nad_computation.main(arguments(tmp_path, *AGREE, "--num-networks", 500))
    about = arrays(tmp_path)[2]
    number = about["num_networks"]
    assert number in set(look_points(500)) and 16 < number < 500
    assert about["agreement"]["split_half_overlap"] >= 0.6
    for look in look_points(500):
        if look < number:
            assert compute_nads(PLAIN, num_networks=look, image_size=8)[1].agreement(16) < 0.6
    nads, _ = compute_nads(PLAIN, num_networks=number, image_size=8)
    np.testing.assert_array_equal(arrays(tmp_path)[0], nads.directions)


def test_a_run_until_an_agreement_out_of_reach_ends_with_its_last_network(tmp_path):
    nad_computation.main(arguments(tmp_path, "--until-agreement", 1, "--agreement-k", 4, "--num-networks", 20))
    assert arrays(tmp_path)[2]["num_networks"] == 20


# --- ranks


RANKS = """
import json, os, sys
import torch
torch.set_num_threads(1)
import nad_computation
from utils import distributed
distributed.num_cores = lambda: 1
for size, port, argv in json.load(sys.stdin):
    if size == 1:  # in this process, so that those forked later find everything loaded
        nad_computation.main(argv)
        print("codes 0", flush=True)
        continue
    ranks = []
    for rank in range(size):
        ranks.append(os.fork())
        if not ranks[-1]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                nad_computation.main(argv)
                code = 0
            except SystemExit as error:
                code = error.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    print("codes", *[os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks], flush=True)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Runs by several ranks as torchrun starts them, one after the other; forked, to import torch only once."""
    folder = tmp_path_factory.mktemp("ranks")

    def lenet(name, number):
        return arguments(folder / name, "--num-networks", number, "--agreement-k", 20, arch="lenet", size=16)

    until = arguments(folder / "until", *AGREE, "--num-networks", 500)
    jobs = [(size, lenet(f"lenet-{size}", 8)) for size in (1, 2, 3)]
    jobs += [(size, lenet("changing", number)) for size, number in ((1, 3), (3, 6), (2, 8))]
    jobs += [(size, arguments(folder / f"sampled-{size}", "--estimator", "sampled", "--num-networks", 70))
             for size in (1, 3)]  # fmt: skip
    jobs += [(4, arguments(folder / "idle", "--num-networks", 3)), (1, arguments(folder / "busy", "--num-networks", 3))]
    jobs += [(1, until), (2, arguments(folder / "until-2", *AGREE, "--num-networks", 500)), (2, until), (3, until)]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RANKS], cwd=ROOT, text=True, capture_output=True, timeout=1800,
        input=json.dumps([(size, free_port(), argv) for size, argv in jobs]),
    )  # fmt: skip
    codes = [line for line in process.stdout.splitlines() if line.startswith("codes")]
    assert codes == ["codes" + " 0" * size for size, _ in jobs], process.stderr[-3000:]
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_give_the_same_as_one(ranks, size):
    assert_same(ranks / f"lenet-{size}", ranks / "lenet-1")


def test_several_ranks_give_the_same_sampled_covariance(ranks):
    assert_same(ranks / "sampled-3", ranks / "sampled-1")


def test_ranks_without_a_network_change_nothing(ranks):
    singles = [arrays(ranks / name) for name in ("idle", "busy")]
    np.testing.assert_allclose(singles[0][1], singles[1][1], rtol=1e-6, atol=1e-6 * singles[0][1][0])
    assert singles[0][2]["weight_variance"] == singles[1][2]["weight_variance"]


def test_a_run_continued_by_other_numbers_of_ranks_gives_the_same(ranks):
    assert_same(ranks / "changing", ranks / "lenet-1")


def test_agreement_stops_two_ranks_where_it_stops_one_and_more_ranks_find_nothing_left_to_do(ranks):
    assert_same(ranks / "until-2", ranks / "until")
    numbers = [set(torch.load(part)["numbers"]) for part in sorted((ranks / "until").glob("part-*.pt"))]
    assert len(numbers) == 3 and not numbers[1] and not numbers[2]


def test_the_script_starts_its_own_ranks_and_torchrun_continues(tmp_path):
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, number in (([], 5), (torchrun, 9)):
        command = arguments(tmp_path / "run", "--num-networks", number)
        process = subprocess.run(
            [sys.executable, *start, str(ROOT / "nad_computation.py"), *command], cwd=ROOT, env=environment,
            timeout=1800, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.count("networks; two halves") == 1
    nad_computation.main(arguments(tmp_path / "one", "--num-networks", 9))
    assert_same(tmp_path / "run", tmp_path / "one")


# --- torchvision


def test_a_torchvision_network_gives_nads_of_colour_images():
    nads, drawn = compute_nads("torchvision:resnet18", num_networks=2, num_channels=3, image_size=8)
    assert nads.directions.shape == (192, 192) and nads.singular_values[0] > 0
    assert nad_computation.weight_variance(drawn.weights) == 1 / (3 * 512)


@pytest.mark.slow
def test_a_torchvision_network_gives_nads_of_32x32_colour_images():
    nads, _ = compute_nads("torchvision:resnet18", num_networks=2, num_channels=3)
    assert nads.directions.shape == (3072, 3072) and np.isfinite(nads.singular_values).all()


def test_a_torchvision_network_that_ends_in_a_convolution_is_refused(tmp_path, capsys):
    error = refusal(
        capsys, *arguments(tmp_path / "run", "--num-channels", 3, arch="torchvision:squeezenet1_1", size=32)
    )
    assert "does not end in one" in error


@pytest.mark.slow
def test_torchvisions_vision_transformer_whose_head_is_zero_is_refused(tmp_path, capsys):
    error = refusal(capsys, *arguments(tmp_path / "run", "--num-channels", 3, arch="torchvision:vit_b_16", size=32))
    assert "weights of the last linear layer are all zero" in error


# --- the shipped arrays and the published ones

SHIPPED = {
    "logreg_nad": "LogReg", "lenet_nad": "LeNet", "vgg11_nad": "VGG11", "resnet18_nad": "ResNet18",
    "densenet121_nad": "DenseNet121",
}  # fmt: skip


def shipped(name):
    """The NADs in NADs/ and their JSON."""
    path = ROOT / "NADs" / f"{name}_NADs.npy"
    if not path.exists():
        pytest.skip(f"{path} is not there yet")
    return NADs(np.load(path), np.load(ROOT / "NADs" / f"{name}_eigenvals.npy")), json.loads(
        path.with_suffix(".json").read_text()
    )


def published(reference, name):
    """The authors' NADs of an architecture."""
    directions = load_nads(reference / f"{name}_NADs.npy", 1024).numpy()
    return NADs(directions, load_array(reference / f"{name}_eigenvals.npy"))


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Run a script of NADs_scripts from another folder; the arguments that it gives the experiment."""

    def call(script, *options):
        commands = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(nad_computation, "main", commands.append)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(str(ROOT / "NADs_scripts" / f"{script}.py"), run_name="__main__")
        (command,) = commands
        return nad_computation.parse_arguments(command)

    return call


@pytest.mark.parametrize(("script", "name"), SHIPPED.items())
def test_a_script_regenerates_the_papers_nads_of_its_architecture_in_their_place(called, script, name):
    args = called(script)
    assert paper_name(args.arch) == name and args.output == ROOT / "NADs" and args.run == ROOT / "runs" / "nads" / name
    fixed = {"num_channels": 1, "image_size": 32, "point": "normal", "step": 100, "jacobian": "differences"}
    assert {key: vars(args)[key] for key in fixed} == fixed
    args = called(script, "--num-networks", "9", "--dry-run")
    assert args.num_networks == 9 and args.dry_run


@pytest.mark.parametrize(("script", "name"), SHIPPED.items())
def test_the_shipped_arrays_are_nads_made_by_their_script(called, script, name):
    nads, about = shipped(name)
    assert nads.directions.shape == (1024, 1024) and nads.singular_values.shape == (1024,)
    assert nads.directions.dtype == nads.singular_values.dtype == np.float32
    rows = nads.directions.astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(1024), atol=1e-5)
    assert (np.diff(nads.singular_values) <= 0).all() and nads.singular_values[-1] >= 0
    args = called(script, "--device", "cpu")
    expected = nad_computation.settings(args)
    assert {key: about[key] for key in expected} == expected
    if args.until_agreement:
        assert about["num_networks"] in set(look_points(args.num_networks))
    else:
        assert about["num_networks"] == args.num_networks
    assert about["agreement"]["k"] == 100 and 0 < about["agreement"]["split_half_overlap"] <= 1


def test_the_shipped_logreg_spectrum_is_sampling_noise():
    nads, about = shipped("LogReg")
    assert about["estimator"] == "sampled"
    np.testing.assert_allclose(nads.singular_values[[0, -1]], [2.382, 1.227], rtol=0.02)  # Marchenko-Pastur edges
    assert np.sqrt(np.mean(np.square(nads.singular_values))) == pytest.approx(1.8042, rel=2e-3)


def test_the_shipped_lenet_nads_are_the_published_ones(reference):
    ours, theirs = shipped("LeNet")[0], published(reference, "LeNet")
    assert subspace_overlap(ours.directions, theirs.directions, 100) >= 0.90
    assert log_variance_correlation(ours, theirs) >= 0.999
    np.testing.assert_allclose(ours.singular_values[:501], theirs.singular_values[:501], rtol=0.05)


def test_the_shipped_vgg11_nads_are_the_published_ones(reference):
    assert log_variance_correlation(shipped("VGG11")[0], published(reference, "VGG11")) >= 0.995


@pytest.mark.slow
def test_150_marginal_lenets_have_the_published_spectrum(reference):
    nads, _ = compute_nads("lenet", num_networks=150)
    assert log_variance_correlation(nads, published(reference, "LeNet")) >= 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["marginal", "sampled"])
def test_a_gpu_gives_the_covariance_of_the_cpu_up_to_its_own_draws(estimator):
    options = {"estimator": estimator, "num_networks": 400, "image_size": 8}
    on_gpu, on_cpu = (compute_nads(PLAIN, device=device, **options)[0] for device in ("cuda", "cpu"))
    assert subspace_overlap(on_gpu.directions, on_cpu.directions, 10) > 0.6
    np.testing.assert_allclose(on_gpu.singular_values[:5], on_cpu.singular_values[:5], rtol=0.3)
