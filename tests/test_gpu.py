"""Each script on a GPU, small: it trains, continues, shares the GPU among processes, and agrees with the CPU."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import directional_bias
import nad_computation
import poison_cifar
import predict
from models import build_model
from tests.helpers import count_epochs, rows, run_on_ranks
from tests.tiny_images import write_folder
from utils import cifar, files, runs, seeding, tables, training
from utils.last_layer import draw_network
from utils.nads import NADs

DEVICE = "cuda"
ON_GPU = ["--device", DEVICE]
PLAIN = "tests.tiny_networks:plain"
LINEAR = "--arch lenet --image-size 16 --frequency 1 0 --sigma 0.3 --num-train 1000 --num-test 500 --epochs 8".split()
POISON = "--epochs 4 --batch-size 8 --max-lr 0.02 --data images".split()
SHARED = {  # what two processes share, and the file with its numbers
    "directional_bias": ("--arch logreg --image-size 8 --num-train 60 --num-test 200 --epochs 2", "accuracies.csv"),
    "nad_computation": ("--arch lenet --num-networks 6", "LeNet_eigenvals.npy"),
    "poison_cifar": ("--arch logreg --nad-index 0,5 --epochs 1 --max-lr 0.02 --data images", "accuracies.csv"),
}
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_process", "no_figures")]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder that has images, and keep a checkpoint of every epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "CHECKPOINT_SECONDS", 0)
    write_folder(tmp_path / "images")


def numbers(path):
    """The numbers in a CSV file, row by row, without timings."""
    return [[float(value) for value in row.values()] for row in rows(path)]


def test_tf32_is_the_default_of_trainings_where_the_gpu_has_it():
    default = "tf32" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    directional_bias.main([*LINEAR, *ON_GPU, "--num-train", "100", "--output", "run"])
    assert runs.read_config(Path("run"))["precision"] == default
    assert poison_cifar.parse_arguments([]).precision == default


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_training_learns_in_every_precision(capsys, precision):
    directional_bias.main([*LINEAR, *ON_GPU, "--precision", precision, "--output", "run"])
    (row,) = tables.read_rows(Path("run/accuracies.csv"))
    assert float(row["test_accuracy"]) > 97 and row["device"] == torch.cuda.get_device_name()
    assert f"on {DEVICE} ({row['device']})" in capsys.readouterr().out
    assert runs.read_config(Path("run"))["precision"] == precision


def trained(model, *, graphs):
    """The loss after two epochs in bf16 of six batches of 128 and one of 16, and the weights and statistics."""
    images = torch.randn(784, 1, 32, 32, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    before, labels = images.clone(), (images[:, 0, 3, 4] > 0).long()
    recipe = {"epochs": 2, "batch_size": 128, "max_lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "clip_norm": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        if not graphs:
            patch.setattr(training, "as_graphs", lambda model, *_: model)
        with seeding.default_generator(DEVICE, 2):  # of the dropout
            recipe |= {"generator": torch.Generator(DEVICE).manual_seed(3), "precision": "bf16"}
            history = training.train(model.to(DEVICE), images, labels, **recipe)
    assert torch.equal(images, before)
    return history[-1]["loss"], model.state_dict()


def with_and_without_graphs(build):
    """What `trained` returns of the same network by graphs and without."""
    found = []
    for graphs in (True, False):
        with seeding.default_generator("cpu", 0):
            model = build()
        found.append(trained(model, graphs=graphs))
    return found


@pytest.mark.parametrize("arch", ["lenet", "vgg11", "resnet18"])
def test_a_training_by_graphs_has_the_numbers_of_a_plain_one(monkeypatch, arch):
    record, recorded = torch.cuda.make_graphed_callables, []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *args: recorded.append(args) or record(*args))
    (by_graphs, state), (plain, plain_state) = with_and_without_graphs(lambda: build_model(arch, 1, 2))
    assert len(recorded) == 1
    assert by_graphs == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(state, plain_state, rtol=1e-5, atol=1e-6)


def test_a_prediction_is_made():
    predict.main(["--arch", "lenet", "--num-networks", "2", *ON_GPU, "--output", "run"])
    found = {(row["frequency_y"], row["frequency_x"]): float(row["sensitivity"]) for row in rows("run/predicted.csv")}
    assert len(found) == 130 and found["-2", "0"] > 2 * found["-16", "-16"] > 0


@pytest.mark.parametrize("network", ["--arch tests.tiny_images:with_dropout", "--arch vgg11 --precision bf16"])
def test_an_interrupted_training_continues_and_ends_with_the_same_numbers(monkeypatch, nads_file, network):
    """Plain, and by graphs; both networks have dropout."""
    command = [*network.split(), *POISON, *ON_GPU, "--nads", str(nads_file), "--output"]
    poison_cifar.main([*command, "whole"])
    count_epochs(monkeypatch, stop=2)
    with pytest.raises(SystemExit, match="130"):
        poison_cifar.main([*command, "run"])
    trained = count_epochs(monkeypatch)
    poison_cifar.main([*command, "run"])
    assert trained == [2, 3]
    for name in ("history-nad0-0.csv", "accuracies.csv"):
        np.testing.assert_allclose(numbers(Path("run") / name), numbers(Path("whole") / name), rtol=1e-3)
    weights = torch.load("run/weights-nad0-0.pt", weights_only=True)  # as on a machine without a GPU
    assert {value.device.type for value in weights.values()} == {"cpu"}


@pytest.mark.parametrize("estimator", ["marginal", "sampled"])
def test_the_nads_of_the_same_networks_are_those_of_the_cpu(monkeypatch, estimator):
    def drawn_on_the_cpu(build, device, *seed):
        return draw_network(build, "cpu", *seed).to(device)

    monkeypatch.setattr(nad_computation, "draw_network", drawn_on_the_cpu)
    options = {"estimator": estimator, "num_networks": 200, "image_size": 8}
    found = {device: nad_computation.compute_nads(PLAIN, device=device, **options) for device in (DEVICE, "cpu")}
    (here, sums), (expected, of_cpu) = found[DEVICE], found["cpu"]
    assert isinstance(here, NADs) and sums.outer.device.type == DEVICE
    np.testing.assert_allclose(here.singular_values, expected.singular_values, rtol=1e-4)
    np.testing.assert_allclose(np.abs((here.directions * expected.directions).sum(1)), 1, atol=1e-4)
    torch.testing.assert_close(sums.covariance(estimator).cpu(), of_cpu.covariance(estimator), rtol=1e-4, atol=1e-8)


def test_nads_are_computed_in_two_calls_and_their_sums_are_kept():
    for number in (3, 5):
        command = ["--arch", "lenet", "--num-networks", number, *ON_GPU, "--output", "run"]
        nad_computation.main([str(argument) for argument in command])
    assert nad_computation.finished_networks(Path("run")) == {0, 1, 2, 3, 4}
    nads = np.load("run/LeNet_NADs.npy").astype(np.float64)
    np.testing.assert_allclose(nads @ nads.T, np.eye(1024), atol=1e-5)


@pytest.mark.parametrize("transform", ["poison", "flip"])
def test_images_are_those_of_the_cpu(nads_file, transform):
    data = cifar.load_images(Path("images"))
    nads = torch.from_numpy(np.load(nads_file))
    expected = poison_cifar.prepare(data, transform=transform, nads=nads)
    found = poison_cifar.prepare(data.to(DEVICE), transform=transform, nads=nads.to(DEVICE))
    for name, images in expected.items():
        torch.testing.assert_close(found[name].cpu(), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("launcher", ["torchrun", "--workers"])
@pytest.mark.parametrize("script", SHARED)
def test_two_processes_share_one_gpu_and_give_the_numbers_of_one(capsys, tmp_path, script, launcher):
    options, name = SHARED[script]
    command, main = [*options.split(), *ON_GPU, "--output"], importlib.import_module(script).main
    if launcher == "torchrun":
        out, _ = run_on_ranks(script, *command, "shared", folder=tmp_path)
    else:
        main([*command, "shared", "--workers", "2"])
        out = capsys.readouterr().out
    assert "2 workers" in out
    main([*command, "one"])
    read = numbers if name.endswith("csv") else np.load
    # An accuracy may differ by an image or two: sums on a GPU are not always taken in the same order.
    tolerance = {"rtol": 1e-3, "atol": 1} if name.endswith("csv") else {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(read(Path("shared") / name), read(Path("one") / name), **tolerance)
