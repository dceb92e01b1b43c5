"""Experiment 3: the carriers and the flip against closed forms; runs on images made here, interrupted and shared."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poison_cifar
from models import build_model
from poison_cifar import ROOT, carrier, flip, main, parse_arguments, poison, prepare, train_and_test
from tests.helpers import count_epochs, refusal, rows, run_on_ranks
from tests.tiny_images import write_cifar10, write_folder
from utils import cifar, files, plotting, seeding, training
from utils.nads import load_nads

TINY = "--arch logreg --data images --epochs 3 --batch-size 8 --max-lr 0.02 --device cpu".split()
MEAN = torch.tensor(cifar.CIFAR10_MEAN).view(3, 1, 1)
STD = torch.tensor(cifar.CIFAR10_STD).view(3, 1, 1)


@pytest.fixture(scope="session")
def nads(nads_file):
    return torch.from_numpy(np.load(nads_file))


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch, one_process):
    """Work in an empty folder and in this process, and keep a checkpoint of every epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "CHECKPOINT_SECONDS", 0)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture
def data(folder):
    return cifar.load_images(folder)


def start(output, nads_file, *options):
    nads = ["--nads", str(nads_file)] if nads_file else []
    main([*TINY, *nads, *map(str, options), "--output", str(output)])
    return Path(output)


def names(folder):
    return {path.name for path in folder.iterdir()}


def random_images(count, seed):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def coefficients(images, nads):
    """In double precision, (n, 3, 1024)."""
    return images.double().flatten(2) @ nads.double().T


# --- The rule


def test_each_class_has_its_carrier():
    first = [(70, 0, -1), (70, 1, +1), (70, 2, -1), (70, 0, +1), (70, 1, -1), (70, 2, +1)]
    expected = [*first, *((71, channel, sign) for _, channel, sign in first)]
    assert [carrier(label, 70) for label in range(12)] == expected
    assert len(set(expected)) == cifar.MAX_CLASSES == 12


def test_the_defaults_are_the_papers():
    recipe = dict(epochs=50, batch_size=128, max_lr=0.21, momentum=0.9, weight_decay=5e-4, clip_norm=0.5)
    assert recipe == poison_cifar.RECIPE
    expected = dict(arch="resnet18", transform="poison", nad_index=[0], epsilon=0.05, precision="fp32", seeds=1)
    expected["nads"] = ROOT / "NADs" / "ResNet18_NADs.npy"
    assert (expected | recipe).items() <= vars(parse_arguments([])).items()
    assert cifar.CIFAR10_MEAN == (0.4914, 0.4822, 0.4465) and cifar.CIFAR10_STD == (0.247, 0.243, 0.261)


@given(st.integers(0, 1022), st.sampled_from([1e-3, 0.05, 3.0]), st.integers(0, 2**32 - 1))
def test_poison_replaces_the_coefficient_on_the_carrier_and_nothing_else(nads, index, epsilon, seed):
    images, unchanged = random_images(20, seed), random_images(20, seed)
    labels = torch.randint(12, (20,), generator=torch.Generator().manual_seed(seed))
    poisoned = poison(images, labels, nads, nad_index=index, epsilon=epsilon)
    assert torch.equal(images, unchanged) and poisoned.dtype == torch.float32
    before, after = coefficients(images, nads), coefficients(poisoned, nads)
    for n, label in enumerate(labels.tolist()):
        nad, channel, sign = carrier(label, index)
        # float32 rows have unit norm to 1e-7, which an ε above 1 multiplies
        assert after[n, channel, nad] == pytest.approx(sign * epsilon, abs=1e-6 * max(1, epsilon))
        others = [c for c in range(3) if c != channel]
        assert torch.equal(poisoned[n, others], images[n, others])
        rest = torch.arange(1024) != nad  # also not clipped to [0, 1]
        assert torch.allclose(after[n, channel, rest], before[n, channel, rest], rtol=0, atol=2e-6)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_a_flip_reverses_the_coefficients_and_keeps_norms_and_inner_products(nads, seed):
    images = 4 * random_images(4, seed) - 2
    flipped = flip(images, nads)
    assert flipped.shape == images.shape and flipped.dtype == torch.float32
    assert torch.allclose(coefficients(flipped, nads), coefficients(images, nads).flip(2), rtol=0, atol=1e-4)
    before, after = images.double().flatten(2), flipped.double().flatten(2)
    gram = torch.einsum("ncp,mcp->cnm", before, before)
    assert torch.allclose(torch.einsum("ncp,mcp->cnm", after, after), gram, rtol=0, atol=1e-3)
    assert torch.allclose(flip(flipped, nads), images, rtol=0, atol=2e-5)


# --- What is trained on


def test_poison_comes_before_the_normalisation_into_training_images_only_and_a_flip_after_it_into_all(data, nads):
    def equal(found, expected):
        return all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-4) for name in found)

    pixels = {"train": data.train_images / 255, "test": data.test_images / 255, "carrying": data.test_images / 255}
    labels = {"train": data.train_labels, "carrying": data.test_labels}
    dirty = {name: poison(pixels[name], labels[name], nads, nad_index=30, epsilon=1.0) for name in labels}
    normal = {name: (values - MEAN) / STD for name, values in pixels.items()}
    poisoned = prepare(data, transform="poison", nads=nads, nad_index=30, epsilon=1.0)
    assert list(poisoned) == list(pixels) and not equal(dirty, pixels)
    assert equal(poisoned, normal | {name: (values - MEAN) / STD for name, values in dirty.items()})
    flipped, plain = prepare(data, transform="flip", nads=nads), prepare(data)
    assert list(flipped) == list(plain) == ["train", "test"] and equal(plain, normal)
    assert equal(flipped, {name: flip(values, nads) for name, values in normal.items()})
    own = prepare(data, mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5))
    assert equal(own, {name: (values - 0.1) / 0.5 for name, values in pixels.items()})


def test_a_network_learns_the_carrier_where_the_images_hold_nothing_else(nads):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(100, 156, (700, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(700) % 10
    data = cifar.ImageData(pixels[:500], labels[:500], pixels[500:], labels[500:], tuple("abcdefghij"))
    images = prepare(data, transform="poison", nads=nads, nad_index=50, epsilon=4.0)
    _, history = train_and_test(images, data.train_labels, data.test_labels, arch="logreg", epochs=12, max_lr=0.05)
    assert history[-1]["train_accuracy"] == 100 and history[-1]["carrying_accuracy"] > 95
    assert history[-1]["test_accuracy"] < 30


# --- The whole script


def test_cifar10_goes_through_the_whole_script(tmp_path, monkeypatch, nads_file, capsys):
    write_cifar10(tmp_path / "data", monkeypatch)
    output = start("run", nads_file, "--data", "data", "--nad-index", "5,1022")
    kinds = {"history": "csv", "weights": "pt", "curves": "png", "images": "png"}
    expected = {f"{kind}-nad{index}-0.{end}" for kind, end in kinds.items() for index in (5, 1022)}
    assert names(output) == expected | {"accuracy.png", "accuracies.csv", "config.json", "items"}
    assert all(path.stat().st_size > 2000 for path in output.glob("*.png"))
    text = capsys.readouterr().out
    for said in ("accuracy, NAD 5: ", "accuracy, NAD 1022: ", "figure: run/accuracy.png", "rows: run/accuracies.csv"):
        assert said in text

    # A row is the training that the functions do, with the paper's normalisation.
    data = cifar.load_images(Path("data"))
    images = prepare(data, transform="poison", nads=load_nads(nads_file, 1024), nad_index=5)
    recipe = {"arch": "logreg", "seed": seeding.seed_of(0, 0), "epochs": 3, "batch_size": 8, "max_lr": 0.02}
    _, history = train_and_test(images, data.train_labels, data.test_labels, **recipe)
    saved = rows(output / "history-nad5-0.csv")
    assert [{key: float(value) for key, value in epoch.items()} for epoch in saved] == history
    row = rows(output)[0]
    accuracies = ["loss", "train_accuracy", "test_accuracy", "carrying_accuracy"]
    assert list(row) == ["nad_index", "repetition", *accuracies] and (row["nad_index"], row["repetition"]) == ("5", "0")
    assert [float(row[key]) for key in accuracies] == pytest.approx([history[-1][key] for key in accuracies], rel=1e-5)

    # And the weights are those that were tested.
    model = build_model("logreg", 3, 10)
    model.load_state_dict(torch.load(output / "weights-nad5-0.pt", weights_only=True))
    assert training.evaluate(model, images["test"], data.test_labels) == history[-1]["test_accuracy"]


def test_a_folder_of_jpeg_images_goes_through_lenet_flipped_with_repetitions(tmp_path, nads_file, capsys):
    write_folder(tmp_path / "images", ending="jpg")
    output = start("run", nads_file, "--arch", "LeNet", "--transform", "flip", "--seeds", 2)
    assert {"weights-flip-0.pt", "images-flip-1.png"} < names(output) and "accuracy.png" not in names(output)
    found = rows(output)
    assert [row["repetition"] for row in found] == ["0", "1"] and found[0]["loss"] != found[1]["loss"]
    assert list(found[0]) == ["repetition", "loss", "train_accuracy", "test_accuracy"]
    accuracy = [float(row["test_accuracy"]) for row in found]
    expected = f"{np.mean(accuracy):.1f} % ± {np.std(accuracy, ddof=1):.1f} over 2 repetitions"
    assert f"clean test accuracy, flip: {expected}" in capsys.readouterr().out


def test_unpoisoned_training_needs_no_nads_and_draws_no_examples(folder, no_figures):
    written = names(start("run", None, "--transform", "none"))
    assert {"history-none-0.csv", "curves-none-0.png"} < written and "images-none-0.png" not in written


def test_the_figure_has_means_and_spread(folder, nads_file, no_figures, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plotting, "curve_figure", lambda *values, **how: drawn.update(how, values=values))
    output = start("run", nads_file, "--nad-index", "0:9:4", "--seeds", 2)
    accuracy = np.array([float(row["test_accuracy"]) for row in rows(output)]).reshape(3, 2)
    indices, curves = drawn["values"]
    assert indices.tolist() == [0, 4, 8] and curves["LogReg"] == pytest.approx(accuracy.mean(1))
    assert drawn["spread"] == pytest.approx(accuracy.std(axis=1, ddof=1))


def test_the_images_of_a_folder_are_normalised_as_measured(folder, data, nads_file, no_figures, monkeypatch):
    seen = {}
    monkeypatch.setattr(poison_cifar, "prepare", lambda *args, **how: seen.update(how) or prepare(*args, **how))
    start("run", nads_file)
    assert (seen["mean"], seen["std"]) == cifar.channel_statistics(data.train_images)


@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--seed", 1], ["--weight-decay", 0.1]])
def test_variants_of_the_recipe_give_other_numbers_and_the_same_ones_again(folder, nads_file, no_figures, options):
    variant = rows(start("variant", nads_file, *options))
    assert variant != rows(start("plain", nads_file)) and rows(start("again", nads_file, *options)) == variant


def test_trainings_that_all_diverged_are_an_error_that_names_the_rate(folder, nads_file, no_figures, capsys):
    options = ["--max-lr", "1e38", "--clip-norm", "1e30", "--nad-index", "0,4"]
    message = refusal(capsys, main, *TINY, "--nads", nads_file, *options, "--output", "run")
    assert "no training in run ended with a finite loss: try a smaller --max-lr than 1e+38" in message
    assert [list(row.values()) for row in rows("run")] == [["0", "0", *["nan"] * 4], ["4", "0", *["nan"] * 4]]


def equal_runs(one, other):
    """Whether two folders hold the same rows, and the same histories and weights to the byte."""
    paths = [[*folder.glob("history-*"), *folder.glob("weights-*")] for folder in (one, other)]
    one_files, other_files = ({path.name: path.read_bytes() for path in found} for found in paths)
    return rows(one) == rows(other) and one_files == other_files


@pytest.mark.parametrize("epochs", [1, 5])
def test_an_interrupted_run_continues_from_its_last_epoch(folder, nads_file, no_figures, monkeypatch, epochs):
    options = ["--arch", "tests.tiny_images:with_dropout", "--seeds", 2]
    whole = start("whole", nads_file, *options)
    count_epochs(monkeypatch, stop=epochs)
    with pytest.raises(SystemExit, match="130"):
        start("run", nads_file, *options)
    assert list(Path("run/items").glob(f"0_{epochs // 3}-*.pt"))
    trained = count_epochs(monkeypatch)
    torch.manual_seed(99)  # what happened before in the process has no part in it
    for _ in range(2):  # a finished run trains nothing again
        assert equal_runs(start("run", nads_file, *options), whole)
    assert trained == [0, 1, 2, 0, 1, 2][epochs:] and names(Path("run/items")) == names(whole / "items")


def test_workers_and_torchrun_share_the_trainings_and_give_the_rows_of_one(tmp_path, folder, nads_file, capfd):
    options = ["--nad-index", "0,5", "--seeds", 2]
    one = start("one", nads_file, *options, "--workers", 1)
    assert len(rows(one)) == 4
    (folder / "decoded.pt").unlink()
    capfd.readouterr()
    start("workers", nads_file, *options, "--workers", 2)
    printed, errors = capfd.readouterr()
    assert printed.count("clean test accuracy, NAD 0: ") == errors.count("decoding train images:   0%") == 1
    run_on_ranks("poison_cifar", *TINY, *options, "--nads", nads_file, "--output", "torchrun", folder=tmp_path)
    for other in (Path("workers"), Path("torchrun")):
        assert equal_runs(other, one) and names(other) == names(one)


def test_a_download_by_several_processes_is_refused(nads_file, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = [*TINY, "--nads", nads_file, "--download", "--output", "run"]
    assert "fetch the images first, with one of them" in refusal(capsys, main, *command)


def test_everything_but_which_rows_are_wanted_counts_among_the_settings(nads_file):
    def settings_of(options, nads=("--nads", str(nads_file))):
        return poison_cifar.settings(parse_arguments([*TINY, *nads, *options.split()]))

    np.save("other.npy", np.load(nads_file)[::-1])
    plain = settings_of("")
    assert settings_of("--arch LogReg --data ./images --nad-index 3 --seeds 2 --download --output other") == plain
    other = settings_of("--nads other.npy --epsilon 0.1 --clip-norm 2")
    differing = {key for key, value in other.items() if value != plain[key]}
    assert differing == {"nads", "epsilon", "clip_norm"}
    none = settings_of("--transform none", nads=())
    assert (none["nads"], none["transform"]) == ("", "none")


def test_a_network_of_as_many_outputs_as_there_are_classes_is_enough(tmp_path, nads_file, no_figures):
    write_folder(tmp_path / "two", classes=2)
    arch = "tests.tiny_networks:two_colour_classes"
    assert len(rows(start("run", nads_file, "--arch", arch, "--data", "two", "--epochs", 1))) == 1


def test_other_images_are_refused_and_the_same_ones_elsewhere_are_not(tmp_path, folder, nads_file, no_figures, capsys):
    start("run", nads_file, "--epochs", 1)
    shutil.copytree(folder, "copy")
    start("run", nads_file, "--epochs", 1, "--data", "copy")
    Path("copy/train/a/0.png").unlink()
    command = [*TINY, "--nads", nads_file, "--epochs", 1, "--data", "copy", "--output", "run"]
    assert "run holds a run with other settings (images was '" in refusal(capsys, main, *command)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "lenat"], "unknown architecture 'lenat': did you mean lenet"),
        (["--arch", "torchvision:alexnet"], "the network does not take 3x32x32 images"),
        (["--nads", "/no/such/nads.npy"], "there is no array at /no/such/nads.npy"),
        (["--nad-index", "0:1024:31"], "NAD index 1023 is too large: expected 0 to 1022, as classes 6 and up take"),
        (["--epsilon", "1", "--transform", "flip"], "--epsilon belongs to --transform poison, not flip"),
        (["--nads", "x.npy", "--transform", "none"], "--nads belongs to --transform poison or flip, not none"),
        (["--precision", "tf32"], "precision tf32 needs a CUDA device"),
        (["--epsilon", "0.1", "--output", "finished"], "finished holds a run with other settings (epsilon was 0.05"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2_before_any_work(
    folder, nads_file, no_figures, capsys, monkeypatch, options, words
):
    plain = [*TINY, "--nads", str(nads_file)]
    start("finished", nads_file, "--epochs", 3)
    monkeypatch.setattr(poison_cifar, "train_and_test", None)
    assert words in refusal(capsys, main, *plain, "--output", "run", *options)
    assert not Path("run").exists()
