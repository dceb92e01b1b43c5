"""Experiment 2: the estimators against closed forms and each other; runs shared by ranks, cut short and continued."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch

import nad_computation
from models import build_model, identity, paper_name
from nad_computation import NUM_NETWORKS, ROOT, STEP, compute_nads, draw_point, sampled_nads
from tests.helpers import refusal, run_on_ranks
from utils import files, runs
from utils.last_layer import draw_network, network_rows
from utils.nads import NADs, load_array, load_nads, log_variance_correlation, read_sums, subspace_overlap

TINY = "tests.tiny_networks"
PLAIN = f"{TINY}:plain"
pytestmark = pytest.mark.usefixtures("one_process")


def arguments(folder, *options, arch=PLAIN, size=8):
    """A small run's command line; later options win."""
    fixed = ["--arch", arch, "--image-size", size, "--checkpoints", folder, "--device", "cpu", "--num-networks", 4]
    return [str(argument) for argument in (*fixed, *options)]


def arrays(folder):
    """The directions, the singular values and the JSON of the run in a folder."""
    (path,) = folder.glob("*_NADs.npy")
    values = path.with_name(path.name.replace("_NADs", "_eigenvals"))
    return np.load(path), np.load(values), json.loads(path.with_suffix(".json").read_text())


# --- the point, closed forms


def test_the_point_is_standard_normal_and_follows_the_seed():
    x = draw_point(3)
    assert x.shape == (3, 32, 32) and abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert torch.equal(x, draw_point(3)) and not torch.equal(x, draw_point(3, seed=1))


@pytest.mark.parametrize(("num_channels", "image_size"), [(1, 16), (3, 6)])
def test_the_marginal_covariance_of_a_linear_model_is_exactly_isotropic(num_channels, image_size):
    nads, sums = compute_nads("logreg", num_networks=50, num_channels=num_channels, image_size=image_size)
    dimension = num_channels * image_size**2
    covariance, number = 3 * dimension * sums.covariance("marginal"), 50 * dimension
    scale = covariance.trace().item() / dimension  # the mean square of the drawn weights by that of their distribution
    assert scale == pytest.approx(1, abs=5 * (0.8 / number) ** 0.5)
    torch.testing.assert_close(covariance, scale * torch.eye(dimension, dtype=torch.float64), rtol=0, atol=1e-6)
    np.testing.assert_allclose(nads.singular_values, np.sqrt(9999 * scale / (3 * dimension)), rtol=1e-6)


def test_the_sampled_covariance_of_a_linear_model_is_isotropic_within_its_sampling_error():
    number, dimension = 1000, 64
    nads, sums = compute_nads("logreg", estimator="sampled", num_networks=number, image_size=8)
    excess = 3 * dimension * sums.covariance("sampled").numpy() - np.eye(dimension)
    standard_error = np.where(np.eye(dimension), 0.8**0.5, 1) / number**0.5  # of w² and of w·w' for uniform weights
    z = (excess / standard_error)[np.triu_indices(dimension)]
    assert np.abs(z).max() < 5 and abs(np.mean(z**2) - 1) < 0.15
    edges = np.sqrt(9999 / (3 * dimension)) * (1 + np.array([1, -1]) * np.sqrt(dimension / number))  # Marchenko-Pastur
    np.testing.assert_allclose(nads.singular_values[[0, -1]], edges, rtol=0.03)


# --- the two estimators, other arithmetic, other images


def test_the_marginal_estimate_is_the_mean_of_many_sampled_ones_within_the_sampling_error():
    number, point, both = 400, draw_point(image_size=8), []
    for first, estimator in ((0, "marginal"), (number, "sampled")):  # from different networks
        each = []
        for network in range(first, first + number):
            drawn = draw_network(lambda: build_model(PLAIN, 1, 1, 8), "cpu", 0, "network", network)
            rows = network_rows(drawn, point, estimator=estimator, step=STEP)
            each.append((rows.T @ rows).double())
        both.append(torch.stack(each))  # (N, D, D)
    difference = both[0].mean(0) - both[1].mean(0)
    error = (both[0].var(0) / len(both[0]) + both[1].var(0) / len(both[1])).sqrt()
    z = (difference / error)[torch.triu_indices(*difference.shape).unbind()]
    assert z.abs().max() < 6 and abs(z.square().mean() - 1) < 0.5
    # along the main directions, where a wrong σ_w² would show most
    directions = torch.linalg.eigh(both[1].mean(0)).eigenvectors[:, -8:]
    along = [torch.einsum("nij,ik,jk->nk", each, directions, directions) for each in both]
    error = sum(each.var(0) / len(each) for each in along).sqrt()
    assert ((along[0].mean(0) - along[1].mean(0)).abs() < 4.5 * error).all()


def test_the_command_gives_the_nads_of_the_papers_protocol(tmp_path):
    nad_computation.main(arguments(tmp_path, "--estimator", "sampled", "--num-networks", 200))
    nads = sampled_nads(lambda: build_model(PLAIN, 1, 1, 8), draw_point(image_size=8), num_networks=200)
    rows, values, _ = arrays(tmp_path)
    np.testing.assert_allclose(values[:40], nads.singular_values[:40], rtol=1e-5)
    assert subspace_overlap(rows, nads.directions, 10) == pytest.approx(1, abs=1e-6)


def test_a_torchvision_network_gives_nads_of_colour_images():
    nads, _ = compute_nads("torchvision:resnet18", num_networks=2, num_channels=3, image_size=8)
    assert nads.directions.shape == (192, 192) and nads.singular_values[0] > 0


def test_a_network_whose_last_layer_starts_at_zero_has_nads_by_the_marginal_estimator_alone(tmp_path, capsys):
    nads, _ = compute_nads(f"{TINY}:zero_head", num_networks=4, image_size=8)
    assert nads.singular_values[0] > 0
    command = arguments(tmp_path, "--estimator", "sampled", arch=f"{TINY}:zero_head")
    assert "the input gradients of all networks are zero" in refusal(capsys, nad_computation.main, *command)


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--estimator", "sampled", "--num-networks", 1], "--num-networks 1 has no covariance"),
        (["--num-networks", 0], "'0' is not a positive whole number"),
        (["--step", "nan"], "'nan' is not a positive number"),
        (["--arch", "lenet"], "LeNet needs images of at least 16x16"),
        (["--arch", f"{TINY}:ends_in_convolution"], "does not end in a linear layer of its own: use --estimator"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, capsys, options, words):
    assert words in refusal(capsys, nad_computation.main, *arguments(tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_what_shows_in_a_drawn_network_is_refused_without_arrays(tmp_path, capsys):
    command = arguments(tmp_path, "--step", 1e39)
    assert "are not finite (step 1e+39)" in refusal(capsys, nad_computation.main, *command)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_folder_with_other_settings_more_networks_or_damaged_sums_is_refused_and_left_alone(tmp_path, capsys):
    command = arguments(tmp_path, "--num-networks", 6)
    nad_computation.main(command)
    before = arrays(tmp_path)[0]
    error = refusal(capsys, nad_computation.main, *command, "--step", 10, "--seed", 1)
    assert "seed was 0, now 1; step was 100.0, now 10.0" in error
    error = refusal(capsys, nad_computation.main, *command, "--num-networks", 5)
    assert "has networks up to number 5: ask for 6 or more" in error
    elsewhere = ["--output", tmp_path, "--checkpoints", tmp_path / "new"]
    error = refusal(capsys, nad_computation.main, *command, "--num-networks", 5, *elsewhere)
    assert "NADs.json is of 6 networks, more than 5: choose another --output" in error
    error = refusal(capsys, nad_computation.main, *command, "--step", 10, *elsewhere)
    assert "NADs.json is of other settings (step was 100.0, now 10.0): choose another --output" in error
    part = tmp_path / "part-0-of-1.pt"
    torch.save(torch.load(part) | {"outer": torch.zeros(6, 4)}, part)
    error = refusal(capsys, nad_computation.main, *command)
    assert f"the checkpoint {part} does not hold sums of 64 pixels" in error
    np.testing.assert_array_equal(arrays(tmp_path)[0], before)


# --- the command


def test_the_command_writes_arrays_their_description_and_figures(tmp_path, capsys):
    output = tmp_path / "arrays"
    nad_computation.main(arguments(tmp_path / "run", "--num-networks", 20, "--output", output, size=12))
    rows, values, about = arrays(output)
    ends = ("NADs.npy", "NADs.json", "eigenvals.npy")
    assert {path.name for path in output.iterdir()} == {f"{paper_name(PLAIN)}_{end}" for end in ends}
    assert (tmp_path / "run" / "nads.png").read_bytes().startswith(b"\x89PNG")
    nads, sums = compute_nads(PLAIN, num_networks=20, image_size=12)
    assert rows.shape == (144, 144) and rows.dtype == values.dtype == np.float32
    np.testing.assert_array_equal(rows, nads.directions)
    np.testing.assert_array_equal(values, nads.singular_values.astype(np.float32))
    assert about.pop("torch") == torch.__version__ and about.pop("seconds") > 0
    assert {about.pop(name) is not None for name in ("commit", "command")} == {True}
    assert "√(9999·λ)" in about.pop("scale")
    agreement = round(sums.agreement("marginal", 100), 4)
    arch = identity(PLAIN, build_model(PLAIN, 1, 1, 12))
    expected = {"arch": arch, "estimator": "marginal", "num_channels": 1, "image_size": 12, "seed": 0}
    expected |= {"step": 100.0, "device": runs.device_name(torch.device("cpu")), "num_networks": 20}
    assert about == expected | {"agreement": {"k": 100, "split_half_overlap": agreement}}
    out = capsys.readouterr().out
    assert f"20 networks; two halves agree to {agreement:.3f} on the first 100 directions" in out
    assert "rotate freely" in out


def test_a_variant_is_labelled_and_colour_images_are_flattened_rows(tmp_path):
    options = ["--num-channels", 3, "--estimator", "sampled", "--num-networks", 3]
    nad_computation.main(arguments(tmp_path, *options, size=6))
    rows, values, about = arrays(tmp_path)
    assert rows.shape == (108, 108) and values.shape == (108,)
    assert (about["estimator"], about["num_channels"]) == ("sampled", 3)
    assert about["agreement"] == {"k": 100, "split_half_overlap": None}  # of fewer than four networks


def test_the_defaults_are_the_papers():
    args = nad_computation.parse_arguments([])
    assert (args.arch, args.step, args.image_size, args.num_channels) == ("lenet", 100, 32, 1)
    assert (args.estimator, args.num_networks) == ("marginal", 1000)
    assert nad_computation.parse_arguments(["--estimator", "sampled"]).num_networks == NUM_NETWORKS["sampled"] == 10_000


# --- runs that are continued, and shared by ranks


@pytest.mark.parametrize("estimator", ["marginal", "sampled"])
def test_more_networks_added_later_and_a_run_cut_short_give_the_same_as_all_at_once(tmp_path, monkeypatch, estimator):
    def covariance(folder, number):
        nad_computation.main(arguments(folder, "--estimator", estimator, "--num-networks", number))
        return read_sums(folder.glob("part-*.pt"), 64).covariance(estimator)

    def interrupted(*args, **kwargs):
        left.pop()
        if not left:
            raise KeyboardInterrupt
        return network_rows(*args, **kwargs)

    once = compute_nads(PLAIN, estimator=estimator, num_networks=10, image_size=8)[1].covariance(estimator)
    assert torch.equal([covariance(tmp_path / "later", number) for number in (4, 7, 10, 10)][-1], once)
    network_rows, left = nad_computation.network_rows, [*range(7)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(files, "CHECKPOINT_SECONDS", 0)
        patch.setattr(nad_computation, "network_rows", interrupted)
        covariance(tmp_path / "cut", 10)
    assert nad_computation.finished_networks(tmp_path / "cut") == set(range(6))
    assert torch.equal(covariance(tmp_path / "cut", 10), once)


@pytest.mark.parametrize("options", [["--workers", "3"], None])
def test_workers_and_torchrun_continue_a_run_to_the_numbers_of_one(tmp_path, options):
    nad_computation.main(arguments(tmp_path / "run", "--num-networks", 5))
    command = arguments(tmp_path / "run", "--num-networks", 11)
    if options:
        nad_computation.main([*command, *options])
    else:
        assert run_on_ranks("nad_computation", *command, folder=ROOT)[0].count("networks; two halves") == 1
    nads, _ = compute_nads(PLAIN, num_networks=11, image_size=8)
    rows, values, about = arrays(tmp_path / "run")
    assert about["num_networks"] == 11 and len(list((tmp_path / "run").glob("part-*.pt"))) == (4 if options else 3)
    np.testing.assert_allclose(rows, nads.directions, rtol=0, atol=1e-6)
    np.testing.assert_allclose(values, nads.singular_values, rtol=1e-6, atol=1e-6)


# --- the shipped arrays and the published ones


def shipped(name):
    """The NADs in NADs/ and their JSON."""
    path = ROOT / "NADs" / f"{name}_NADs.npy"
    about = json.loads(path.with_suffix(".json").read_text())
    return NADs(np.load(path), np.load(ROOT / "NADs" / f"{name}_eigenvals.npy")), about


def published(reference, name):
    """The authors' NADs of an architecture."""
    directions = load_nads(reference / f"{name}_NADs.npy", 1024).numpy()
    return NADs(directions, load_array(reference / f"{name}_eigenvals.npy"))


@pytest.mark.parametrize("name", ["LogReg", "LeNet", "VGG11", "ResNet18", "DenseNet121"])
def test_the_shipped_arrays_are_nads_made_by_their_script_in_their_place(monkeypatch, tmp_path, name):
    script, commands = f"{name.lower()}_nad", []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nad_computation, "main", commands.append)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [script, "--device", "cpu"])
    runpy.run_path(str(ROOT / "NADs_scripts" / f"{script}.py"), run_name="__main__")
    args = nad_computation.parse_arguments(*commands)
    assert paper_name(args.arch) == name
    assert (args.output, args.checkpoints) == (ROOT / "NADs", ROOT / "runs" / "nads" / name)
    nads, about = shipped(name)
    assert nads.directions.shape == (1024, 1024) and nads.singular_values.shape == (1024,)
    assert nads.directions.dtype == nads.singular_values.dtype == np.float32
    rows = nads.directions.astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(1024), atol=1e-5)
    assert (np.diff(nads.singular_values) <= 0).all() and nads.singular_values[-1] >= 0
    expected = nad_computation.settings(args) | {"num_networks": args.num_networks}
    del expected["device"]  # there by its name
    assert {key: about[key] for key in expected} == expected
    assert about["agreement"]["k"] == 100 and 0 < about["agreement"]["split_half_overlap"] <= 1


def test_the_shipped_logreg_spectrum_is_sampling_noise():
    nads, about = shipped("LogReg")
    assert about["estimator"] == "sampled"
    np.testing.assert_allclose(nads.singular_values[[0, -1]], [2.382, 1.227], rtol=0.02)  # Marchenko-Pastur edges
    assert np.sqrt(np.mean(np.square(nads.singular_values))) == pytest.approx(1.8042, rel=2e-3)


def test_the_shipped_nads_are_the_published_ones(reference):
    ours, theirs = shipped("LeNet")[0], published(reference, "LeNet")
    assert subspace_overlap(ours.directions, theirs.directions, 100) >= 0.90
    assert log_variance_correlation(ours, theirs) >= 0.999
    np.testing.assert_allclose(ours.singular_values[:501], theirs.singular_values[:501], rtol=0.05)
    assert log_variance_correlation(shipped("VGG11")[0], published(reference, "VGG11")) >= 0.995


@pytest.mark.slow
def test_60_marginal_lenets_have_the_published_spectrum(reference):
    nads, _ = compute_nads("lenet", num_networks=60)
    assert log_variance_correlation(nads, published(reference, "LeNet")) >= 0.999
