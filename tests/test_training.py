"""The recipe: one linear model followed by hand, the precision switches, and the count of right answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from directional_bias import train_on_direction
from models import LeNet, LogReg
from utils.directions import fourier_direction, random_direction
from utils.linear_data import sample_linear_data
from utils.training import evaluate, learning_rate, logits_of, make_optimizer, precision_mode, train, train_epoch

SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_images(num_samples, size=3):
    """Images without structure and their labels, and a linear model."""
    source = generator(7)
    images = torch.randn(num_samples, 1, size, size, generator=source)
    labels = torch.randint(2, (num_samples,), generator=source)
    torch.manual_seed(0)
    return LogReg(size * size, 2), images, labels


# --- The learning rate


@given(st.floats(1e-3, 10), st.integers(1, 30), st.integers(1, 100))
def test_the_rate_falls_linearly_and_is_0_at_the_last_step(max_lr, epochs, steps):
    rates = [learning_rate(max_lr, e, s, steps, epochs) for e in range(epochs) for s in range(steps)]
    total = epochs * steps
    for step, rate in enumerate(rates, start=1):
        assert rate == pytest.approx(max_lr * (total - step) / total, abs=1e-9 * max_lr)


def test_the_rate_of_the_papers_first_steps():
    assert learning_rate(0.5, 0, 0, 79, 20) == pytest.approx(0.5 * (1 - 1 / 1580))
    assert learning_rate(0.5, 10, 39, 79, 20) == pytest.approx(0.5 * (1 - (10 + 40 / 79) / 20))
    assert learning_rate(0.5, 19, 78, 79, 20) == 0


# --- Training, followed by hand


def train_by_hand(model, images, labels, *, epochs, batch_size, max_lr, clip_norm, momentum, weight_decay, source):
    """The same recipe for a linear model, in float64, with the gradient of the cross-entropy written out."""
    x = images.double().flatten(1)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    weights = torch.cat([model.output_fc.weight, model.output_fc.bias[:, None]], dim=1).detach().double()
    velocity, losses, accuracies = None, [], []
    steps = math.ceil(len(x) / batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=source)
        loss, correct = 0.0, 0
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            probabilities = (x[batch] @ weights.T).softmax(1)
            loss -= probabilities[range(len(batch)), labels[batch]].log().sum().item()
            correct += (probabilities.argmax(1) == labels[batch]).sum().item()
            gradient = (probabilities - F.one_hot(labels[batch], 2)).T @ x[batch] / len(batch)
            gradient = gradient * min(1.0, clip_norm / gradient.norm().item())
            gradient = gradient + weight_decay * weights
            velocity = gradient if velocity is None else momentum * velocity + gradient
            t = epoch + (step + 1) / steps
            weights = weights - max_lr * (1 - t / epochs) * velocity
        losses.append(loss / len(x))
        accuracies.append(100 * correct / len(x))
    return weights, losses, accuracies


@pytest.mark.parametrize("num_samples", [12, 13, 3])  # whole batches of 4; a last one of 1; a single short one
@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.05)])
def test_training_takes_the_steps_of_the_recipe(num_samples, clip_norm, momentum, weight_decay):
    model, images, labels = noise_images(num_samples)
    recipe = dict(epochs=3, batch_size=4, max_lr=0.5, clip_norm=clip_norm, momentum=momentum, weight_decay=weight_decay)
    weights, losses, accuracies = train_by_hand(model, images, labels, source=generator(5), **recipe)
    history = train(model, images, labels, generator=generator(5), **recipe)
    trained = torch.cat([model.output_fc.weight, model.output_fc.bias[:, None]], dim=1).double()
    torch.testing.assert_close(trained, weights, rtol=0, atol=2e-6)
    assert [row["epoch"] for row in history] == [0, 1, 2]
    assert [row["loss"] for row in history] == pytest.approx(losses, abs=1e-5)
    assert [row["train_accuracy"] for row in history] == pytest.approx(accuracies)


def test_a_step_is_never_longer_than_the_rate_times_the_clipping_norm():
    model, images, labels = noise_images(8)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = make_optimizer(model, max_lr=1.0)
    train_epoch(
        model, optimizer, 1000 * images, labels, epoch=0, epochs=4, batch_size=8, max_lr=1.0, clip_norm=0.5,
        generator=generator(),
    )  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm() == pytest.approx(0.75 * 0.5, rel=1e-4)  # one step, at rate 1 − 1/4


class Recorder(nn.Module):
    """A linear model that remembers its batches."""

    def __init__(self, size):
        super().__init__()
        self.linear = LogReg(size, 2)
        self.batches = []

    def forward(self, x):
        """Logits of the images."""
        self.batches.append((self.training, x))
        return self.linear(x)


def test_an_epoch_takes_every_sample_once_in_a_fresh_order_with_the_short_last_batch():
    model, images = Recorder(1), torch.arange(10.0).view(10, 1, 1, 1)
    train(model, images, torch.zeros(10).long(), epochs=2, batch_size=4, generator=generator())
    assert [len(x) for _, x in model.batches] == [4, 4, 2] * 2 and all(training for training, _ in model.batches)
    first, second = torch.cat([x.flatten() for _, x in model.batches]).view(2, 10).tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_training_depends_on_its_generator_alone():
    outcomes = []
    for seed, disturbance in [(1, 0), (1, 99), (2, 0)]:
        model, images, labels = noise_images(20)
        torch.manual_seed(disturbance)
        train(model, images, labels, epochs=2, batch_size=6, generator=generator(seed))
        outcomes.append(model.output_fc.weight.detach())
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[0], outcomes[2])


def test_a_test_set_is_evaluated_after_each_epoch_without_touching_the_training():
    model, images, labels = noise_images(20)
    watched = train(model, images, labels, epochs=3, generator=generator(1), tests={"test": (images, labels)})
    weight = model.output_fc.weight.detach()
    assert watched[-1]["test_accuracy"] == evaluate(model, images, labels)
    model, images, labels = noise_images(20)
    alone = train(model, images, labels, epochs=3, generator=generator(1))
    assert torch.equal(model.output_fc.weight, weight)
    assert alone == [{key: row[key] for key in ("epoch", "loss", "train_accuracy")} for row in watched]


def test_training_goes_on_in_training_mode_after_an_evaluation():
    model, images = Recorder(1), torch.ones(4, 1, 1, 1)
    labels = torch.zeros(4).long()
    train(model, images, labels, epochs=2, batch_size=4, generator=generator(), tests={"test": (images, labels)})
    assert [training for training, _ in model.batches] == [True, False, True, False]


def test_a_long_training_shows_its_epochs_and_a_short_one_does_not(monkeypatch, capsys):
    model, images, labels = noise_images(20)
    train(model, images, labels, epochs=3, generator=generator())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("utils.training.PATIENCE", 0)
    train(model, images, labels, epochs=3, generator=generator())
    assert "epochs: " in capsys.readouterr().err


def test_augment_sees_every_batch_and_the_generator():
    model, images, labels = noise_images(5)
    seen = []

    def augment(x, source):
        seen.append((len(x), torch.rand((), generator=source).item()))
        return torch.zeros_like(x)

    loss, _ = train_epoch(
        model, make_optimizer(model, max_lr=1e-9), images, labels, epoch=0, epochs=1, batch_size=3, max_lr=1e-9,
        clip_norm=1.0, generator=generator(), augment=augment,
    )  # fmt: skip
    assert [length for length, _ in seen] == [3, 2] and seen[0][1] != seen[1][1]
    assert loss == pytest.approx(F.cross_entropy(model(torch.zeros(5, 1, 3, 3)), labels).item(), abs=1e-6)


def test_logistic_regression_learns_every_direction():
    directions = [fourier_direction(*k, height=16, width=16) for k in [(0, 0), (-2, 5), (-8, 3)]]
    for v in [*directions, random_direction((1, 16, 16), generator())]:
        outcome = train_on_direction(v, arch="logreg", num_train=3000, num_test=1000, sigma=1.0, epochs=10)
        assert outcome["test_accuracy"] == 100


def test_training_on_a_direction_depends_on_its_seed_and_leaves_torchs_generator_alone():
    v = fourier_direction(1, 2, height=8, width=8)
    sizes = dict(arch="logreg", num_train=50, num_test=500, epochs=1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = train_on_direction(v, seed=1, **sizes)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert train_on_direction(v, seed=1, **sizes) == first != train_on_direction(v, seed=2, **sizes)


def test_divergence_ends_the_training_and_is_reported_as_nan():
    model, images, labels = noise_images(20)
    history = train(model, images, labels, epochs=9, max_lr=1e38, clip_norm=1e30, batch_size=4, generator=generator())
    assert len(history) < 9 and not math.isfinite(history[-1]["loss"])
    v = fourier_direction(1, 2, height=8, width=8)
    outcome = train_on_direction(v, arch="logreg", num_train=50, num_test=50, epochs=3, max_lr=1e38, clip_norm=1e30)
    assert math.isnan(outcome["test_accuracy"]) and math.isnan(outcome["final_loss"])


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_nan_that_pooling_hides_from_the_loss_is_reported(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = LeNet(1, 2, image_size=18)
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = math.nan
    history = train(model, torch.randn(8, 1, 18, 18), torch.arange(8) % 2, epochs=3, generator=generator())
    assert len(history) == 1 and math.isnan(history[0]["loss"])


# --- Evaluation


class SignOfFirstPixel(nn.Module):
    """Predicts 1 where the first pixel is positive; dropout would disturb it in training mode."""

    def forward(self, x):
        """Two logits an image."""
        pixel = F.dropout(x, 0.9, self.training)[:, 0, 0, :1]
        return torch.cat([-pixel, pixel], dim=1)


@given(st.lists(st.tuples(st.sampled_from([-2.0, -1.0, 1.0, 2.0]), st.integers(0, 1)), min_size=1, max_size=30))
def test_accuracy_is_the_counted_one_whatever_the_batch_size(samples):
    images = torch.tensor([pixel for pixel, _ in samples]).view(-1, 1, 1, 1)
    labels = torch.tensor([label for _, label in samples])
    right = sum((pixel > 0) == label for pixel, label in samples)
    for batch_size in (1, 7, 500):
        answer = evaluate(SignOfFirstPixel(), images, labels, batch_size=batch_size)
        assert answer == pytest.approx(100 * right / len(samples))


def test_evaluation_changes_no_statistics_and_keeps_no_gradients():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(9, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, images, labels = noise_images(10)
    evaluate(model, images, labels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- The layout in memory


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_both_layouts_give_the_logits_and_gradients_of_the_definition(monkeypatch, num_channels, pooling):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    torch.manual_seed(0)
    model = LeNet(num_channels, 2, image_size=18, pooling=pooling).to(memory_format=torch.channels_last)
    x = torch.randn(5, num_channels, 18, 18)
    labels = torch.tensor([0, 1, 1, 0, 1])
    given = []
    model.register_forward_pre_hook(lambda _, args: given.append(args[0].is_mkldnn))

    def loss_and_gradients(logits):
        return [loss := F.cross_entropy(logits, labels), *torch.autograd.grad(loss, model.parameters())]

    exact = LeNet(num_channels, 2, image_size=18, pooling=pooling).double()
    exact.load_state_dict(model.state_dict())
    loss = F.cross_entropy(exact(x.double()), labels)
    expected = [loss, *torch.autograd.grad(loss, exact.parameters())]
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        for found, true in zip(loss_and_gradients(logits_of(model, x)), expected, strict=True):
            torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-6)
    with precision_mode("bf16", "cpu"):
        logits_of(model, x)
    assert given == [False, True, False]  # under autocast the layout is the ordinary one


# --- Precision


@pytest.fixture(params=["none", "tf32", "ieee"])
def before(request):
    """What the switches are set to before the test, and their own values again after it."""
    own = [switch.fp32_precision for switch in SWITCHES]
    for switch in SWITCHES:
        switch.fp32_precision = request.param
    yield [switch.fp32_precision for switch in SWITCHES]  # "none" may read as what it stands for
    for switch, value in zip(SWITCHES, own, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tf32_is_off_within_the_block_and_as_before_after_it(precision, before):
    with precision_mode(precision, "cpu"):
        assert [switch.fp32_precision for switch in SWITCHES] == ["ieee", "ieee"]
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert [switch.fp32_precision for switch in SWITCHES] == before
    with pytest.raises(RuntimeError, match="inside"), precision_mode(precision, "cpu"):
        raise RuntimeError("inside")
    assert [switch.fp32_precision for switch in SWITCHES] == before
    assert not torch.is_autocast_enabled("cpu")


def test_a_precision_that_the_device_lacks_or_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="tf32 needs a CUDA device, not cpu"), precision_mode("tf32", "cpu"):
        pass
    with (
        pytest.raises(ValueError, match="'fp16' is unknown: expected one of fp32, tf32, bf16"),
        precision_mode("fp16", "cpu"),
    ):
        pass


def test_every_step_in_bf16_rounds_the_weights_of_that_step():
    model, images, labels = noise_images(64)
    images = 0.1 * images
    recipe = dict(epochs=2, batch_size=4, max_lr=5.0, clip_norm=1e6)
    history = train(model, images, labels, generator=generator(1), precision="bf16", **recipe)
    assert all(p.dtype == torch.float32 for p in model.parameters())

    by_hand, _, _ = noise_images(64)
    optimizer, source = make_optimizer(by_hand, max_lr=5.0), generator(1)
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
    torch.testing.assert_close(model.output_fc.weight, by_hand.output_fc.weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", ["logreg", "lenet"])
def test_bf16_learns_and_counts_like_fp32(arch):
    v = fourier_direction(1, 0, height=16, width=16)
    sizes = dict(arch=arch, num_train=1000, num_test=500, sigma=0.3, epochs=4)
    outcomes = [train_on_direction(v, precision=precision, **sizes) for precision in ("fp32", "bf16")]
    assert all(outcome["test_accuracy"] > 97 for outcome in outcomes)


@pytest.mark.gpu
def test_tf32_rounds_and_fp32_does_not():
    a = torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    exact = a.double() @ a.double()
    errors = {}
    for precision in ("fp32", "tf32"):
        with precision_mode(precision, "cuda"):
            errors[precision] = (a @ a - exact).abs().max().item()
    assert errors["fp32"] < 1e-3 < errors["tf32"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_precision_trains_on_the_gpu(precision):
    v = fourier_direction(1, 0).cuda()
    outcome = train_on_direction(
        v, arch="logreg", num_train=2000, num_test=500, sigma=0.3, epochs=4, precision=precision
    )
    assert outcome["test_accuracy"] > 99


@given(st.integers(1, 9), st.integers(1, 9))
def test_the_data_are_those_of_the_definition_for_any_split_of_batches(num_samples, batch_size):
    v = random_direction((1, 2, 2), generator(1))
    images, labels = sample_linear_data(v, num_samples, generator=generator(2))
    history = train(LogReg(4, 2), images, labels, epochs=1, batch_size=batch_size, generator=generator())
    assert 0 <= history[0]["train_accuracy"] <= 100 and math.isfinite(history[0]["loss"])
