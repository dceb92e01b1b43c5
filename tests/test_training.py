"""The recipe: one linear model followed by hand, the precision switches, and the count of right answers."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from directional_bias import train_on_direction
from models import LeNet, LogReg, build_model
from tests import tiny_networks
from tests.helpers import count_epochs
from utils import files, training
from utils.directions import fourier_direction, random_direction
from utils.precision import as_graphs, autocast, set_fp32
from utils.training import LOSS_WINDOW, evaluate, first_step_below, learning_rate, train

RECIPE = {"epochs": 3, "batch_size": 4, "max_lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.5}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_images(num_samples, size=3):
    """A linear model, and images without structure with their labels."""
    source = generator(7)
    images = torch.randn(num_samples, 1, size, size, generator=source)
    labels = torch.randint(2, (num_samples,), generator=source)
    torch.manual_seed(0)
    return LogReg(size * size, 2), images, labels


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@given(st.floats(1e-3, 10), st.integers(1, 30), st.integers(1, 100))
def test_the_rate_falls_linearly_and_is_0_at_the_last_step(max_lr, epochs, steps):
    rates = [learning_rate(max_lr, e, s, steps, epochs) for e in range(epochs) for s in range(steps)]
    total = epochs * steps
    for step, rate in enumerate(rates, start=1):
        assert rate == pytest.approx(max_lr * (total - step) / total, abs=1e-9 * max_lr)


def train_by_hand(model, images, labels, *, epochs, batch_size, max_lr, clip_norm, momentum, weight_decay, source):
    """The same recipe for a linear model, in float64, with the gradient of the cross-entropy written out."""
    x = images.double().flatten(1)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    weights = torch.cat([model.output_fc.weight, model.output_fc.bias[:, None]], dim=1).detach().double()
    velocity, history = 0, []
    steps = math.ceil(len(x) / batch_size)
    for epoch in range(epochs):
        loss, correct = 0.0, 0
        for step, batch in enumerate(torch.randperm(len(x), generator=source).split(batch_size)):
            probabilities = (x[batch] @ weights.T).softmax(1)
            loss -= probabilities[range(len(batch)), labels[batch]].log().sum().item()
            correct += (probabilities.argmax(1) == labels[batch]).sum().item()
            gradient = (probabilities - F.one_hot(labels[batch], 2)).T @ x[batch] / len(batch)
            gradient = gradient * min(1.0, clip_norm / gradient.norm().item())
            velocity = momentum * velocity + gradient + weight_decay * weights
            weights = weights - max_lr * (1 - (epoch + (step + 1) / steps) / epochs) * velocity
        history.append({"epoch": epoch, "loss": loss / len(x), "train_accuracy": 100 * correct / len(x)})
    return weights, history


@pytest.mark.parametrize("num_samples", [12, 13, 3])  # whole batches of 4; a last one of 1; a single short one
@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.05)])
def test_training_takes_the_steps_of_the_recipe(num_samples, clip_norm, momentum, weight_decay):
    model, images, labels = noise_images(num_samples)
    recipe = RECIPE | {"clip_norm": clip_norm, "momentum": momentum, "weight_decay": weight_decay}
    weights, expected = train_by_hand(model, images, labels, source=generator(5), **recipe)
    history = train(model, images, labels, generator=generator(5), **recipe)
    trained = torch.cat([model.output_fc.weight, model.output_fc.bias[:, None]], dim=1).double()
    torch.testing.assert_close(trained, weights, rtol=0, atol=2e-6)
    assert len(history) == 3 and history == [pytest.approx(row, abs=1e-5) for row in expected]


def test_a_long_training_shows_its_epochs_and_a_short_one_does_not(monkeypatch, capsys):
    model, images, labels = noise_images(20)
    train(model, images, labels, generator=generator(), **RECIPE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(training, "PROGRESS_AFTER_SECONDS", 0)
    train(model, images, labels, generator=generator(), **RECIPE)
    assert "epochs: " in capsys.readouterr().err


def test_logistic_regression_learns_every_direction():
    for v in (fourier_direction(0, 0, size=16), random_direction((1, 16, 16), generator())):
        outcome = train_on_direction(v, arch="logreg", num_train=3000, num_test=1000, sigma=1.0, epochs=10)
        assert outcome["test_accuracy"] == 100


def test_divergence_ends_the_training_and_is_reported_as_nan():
    v, wild = fourier_direction(1, 2, size=8), {"max_lr": 1e38, "clip_norm": 1e30, "epochs": 9}
    model, images, labels = noise_images(20)
    history = train(model, images, labels, generator=generator(), **RECIPE | wild)
    assert len(history) < 9 and not math.isfinite(history[-1]["loss"])
    outcome = train_on_direction(v, arch="logreg", num_train=50, num_test=50, **wild)
    assert math.isnan(outcome["test_accuracy"]) and math.isnan(outcome["final_loss"])


def test_a_nan_that_pooling_hides_from_the_loss_is_reported():
    model = LeNet(1, 2, image_size=18)
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = math.nan
    history = train(model, torch.randn(8, 1, 18, 18), torch.arange(8) % 2, generator=generator(), **RECIPE)
    assert len(history) == 1 and math.isnan(history[0]["loss"])


def train_until(epoch, path, monkeypatch, *, hidden=8):
    """Train a network with statistics and dropout, which the keyboard stops in this epoch, if it comes to that."""
    _, images, labels = noise_images(20)
    layers = (nn.Flatten(), nn.Linear(9, hidden), nn.BatchNorm1d(hidden), nn.Dropout(0.3), nn.Linear(hidden, 2))
    model, trained = nn.Sequential(*layers), count_epochs(monkeypatch, stop=epoch)
    options = RECIPE | {"epochs": 5, "momentum": 0.9, "weight_decay": 0.01, "checkpoint": path}
    history = train(model, images, labels, generator=generator(), tests={"test": (images, labels)}, **options)
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    return history, state, trained


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_interrupted_training_continues_from_its_last_epoch_and_ends_the_same(tmp_path, monkeypatch, epoch):
    history, state, _ = train_until(None, tmp_path / "state.pt", monkeypatch)
    assert not (tmp_path / "state.pt").exists()  # it took less than CHECKPOINT_SECONDS
    monkeypatch.setattr(files, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        train_until(epoch, tmp_path / "state.pt", monkeypatch)
    assert (tmp_path / "state.pt").exists() == (epoch > 0)
    for left in ([*range(epoch, 5)], []):  # the second time it is complete
        assert train_until(None, tmp_path / "state.pt", monkeypatch) == (history, state, left)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHECKPOINT_SECONDS", 0)
    path = tmp_path / "state.pt"
    train_until(None, path, monkeypatch)
    words = rf"^the checkpoint {path} does not fit \(.+\): delete it to start again$"
    with pytest.raises(ValueError, match=words):
        train_until(None, path, monkeypatch, hidden=9)
    state = files.load_checkpoint(path)
    for other in ({}, [], state | {"optimizer": {}}, state | {"generators": {"order": torch.zeros(3)}}):
        files.save_checkpoint(path, other)
        with pytest.raises(ValueError, match=words):
            train_until(None, path, monkeypatch)


class SignOfFirstPixel(nn.Module):
    """Predicts 1 where the first pixel is positive; dropout and statistics would disturb it in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, affine=False)

    def forward(self, x):
        """Two logits an image."""
        pixel = F.dropout(self.norm(x), 0.9, self.training)[:, 0, 0, :1]
        return torch.cat([-pixel, pixel], dim=1)


@given(st.lists(st.tuples(st.sampled_from([-2.0, -1.0, 1.0, 2.0]), st.integers(0, 1)), min_size=1, max_size=30))
def test_accuracy_is_the_counted_one_whatever_the_batch_size(samples):
    images = torch.tensor([pixel for pixel, _ in samples]).view(-1, 1, 1, 1)
    labels = torch.tensor([label for _, label in samples])
    right = sum((pixel > 0) == label for pixel, label in samples)
    for batch_size in (1, 7, 500):
        answer = evaluate(SignOfFirstPixel(), images, labels, batch_size=batch_size)
        assert answer == pytest.approx(100 * right / len(samples))


@pytest.mark.parametrize(("precision", "value"), [("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")])
def test_fp32_is_rounded_to_tf32_only_where_that_is_asked_for_and_all_flags_can_be_read(precision, value):
    set_fp32(precision, "cuda")
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    assert {switch.fp32_precision for switch in switches} == {value}
    older = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    assert older == [value == "tf32"] * 2
    assert torch.get_float32_matmul_precision() == ("high" if value == "tf32" else "highest")
    with autocast(precision, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    set_fp32("fp32", "cuda")


def test_a_precision_that_the_device_lacks_or_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="tf32 needs a CUDA device, not cpu"):
        set_fp32("tf32", "cpu")
    with pytest.raises(ValueError, match=r"'fp16' is unknown: .* fp32, tf32, bf16"):
        set_fp32("fp16", "cpu")


def test_every_step_in_bf16_rounds_the_weights_of_that_step():
    model, images, labels = noise_images(64)
    by_hand, _, _ = noise_images(64)
    images = 0.1 * images
    recipe = RECIPE | {"epochs": 2, "max_lr": 5.0, "clip_norm": 1e6}
    history = train(model, images, labels, generator=generator(1), precision="bf16", **recipe)
    optimizer, source = torch.optim.SGD(by_hand.parameters()), generator(1)
    for epoch in range(2):
        total = 0.0
        for step, batch in enumerate(torch.randperm(64, generator=source).split(4)):
            optimizer.param_groups[0]["lr"] = learning_rate(5.0, epoch, step, 16, 2)
            with torch.autocast("cpu", torch.bfloat16):  # a fresh one each step: nothing is kept from the last
                logits = by_hand(images[batch])
            assert logits.dtype == torch.bfloat16
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += 4 * loss.item()
        assert history[epoch]["loss"] == pytest.approx(total / 64, rel=1e-4)
    torch.testing.assert_close(weights_of(model), weights_of(by_hand), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_learns_and_counts_like_fp32(precision):
    sizes = {"num_train": 1000, "num_test": 500, "sigma": 0.3, "epochs": 4}
    assert train_on_direction(fourier_direction(1, 0, size=16), precision=precision, **sizes)["test_accuracy"] > 97


@pytest.mark.gpu
def test_tf32_rounds_and_fp32_does_not():
    a = torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    exact, errors = a.double() @ a.double(), {}
    for precision in ("fp32", "tf32"):
        set_fp32(precision, "cuda")
        errors[precision] = (a @ a - exact).abs().max().item()
    assert errors["fp32"] < 1e-3 < errors["tf32"]


@pytest.fixture
def recorded(monkeypatch):
    """The networks that were recorded as graphs: on a CPU, with a stand-in for torch's recording."""
    found = []

    def record(network, samples):
        for _ in range(3):
            network(*samples)
        samples[0].zero_()
        found.append(network)
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    return found


def test_recording_graphs_leaves_statistics_and_images_as_they_were(recorded):
    model, images = build_model("resnet18", 1, 2).train(), torch.ones(2, 1, 32, 32)
    before = copy.deepcopy(model.state_dict())
    assert [as_graphs(model, images, "fp32")] == recorded and recorded[0][0] is model
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert images.all()


def test_graphs_are_of_networks_from_here_and_of_torchs_layers_alone(recorded):
    lenet = LeNet()
    lenet.add_module("own", tiny_networks.plain())
    for model in (tiny_networks.plain(), lenet):
        assert as_graphs(model, torch.ones(2, 1, 8, 8), "fp32") is model
    assert not recorded
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    assert as_graphs(layers, torch.ones(2, 1, 8, 8), "fp32") is not layers and len(recorded) == 1


# --- How fast a direction is learnt


@given(st.lists(st.floats(0, 2), min_size=1, max_size=60), st.floats(0.1, 1.9))
def test_the_first_step_at_which_the_mean_of_the_last_losses_is_small(losses, limit):
    steps = range(LOSS_WINDOW, len(losses) + 1)
    means = {step: sum(losses[step - LOSS_WINDOW : step]) / LOSS_WINDOW for step in steps}
    if any(abs(mean - limit) < 1e-6 for mean in means.values()):
        return
    expected = min((step for step, mean in means.items() if mean < limit), default=math.nan)
    assert first_step_below(torch.tensor(losses), limit) == pytest.approx(expected, nan_ok=True)


def test_training_until_the_loss_is_small_keeps_its_rate_and_ends_with_that_epoch(tmp_path, monkeypatch):
    _, images, labels = noise_images(20, size=8)
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda own: rates.append(own.param_groups[0]["lr"]) or step(own))
    options = RECIPE | {"epochs": 100, "until_loss": 0.2}
    history = train(LogReg(64, 2), images, labels, generator=generator(), **options)
    assert set(rates) == {0.5} and len(rates) == 5 * len(history) < 500
    assert 5 * (len(history) - 1) < history[-1]["steps"] <= 5 * len(history)
    assert all(math.isnan(epoch["steps"]) for epoch in history[:-1])
