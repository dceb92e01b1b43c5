"""The plain way to do each experiment, which one would write first, and ours; timed in processes of their own.

A measurement is a generator: it warms up until a first `yield`, is timed until a second, and may yield numbers then.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from directional_bias import RECIPE
from models import build_model, paper_name
from nad_computation import ROOT, STEP, draw, draw_point
from predict import squared_differences
from utils import training, workers
from utils.directions import fourier_map
from utils.last_layer import network_rows
from utils.nads import AUTHORS_SCALE, load_array, load_nads

SEED = 1  # not that of the arrays in NADs/: the networks here are independent of their covariance


def plain_train(arch: str, device: torch.device, images: int) -> Iterator:
    """An epoch of experiment 1, fed by a DataLoader with 2 workers, two `.item()` in each step."""
    model, pinned = build_model(arch, 1, 2).to(device), device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr=RECIPE["max_lr"])
    for count in (256, images):
        data = TensorDataset(torch.randn(count, 1, 32, 32), torch.randint(2, (count,)))
        for x, y in DataLoader(data, RECIPE["batch_size"], shuffle=True, num_workers=2, pin_memory=pinned):
            optimizer.zero_grad()
            logits, y = model(x.to(device)), y.to(device)
            loss = nn.functional.cross_entropy(logits, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip_norm"])
            optimizer.step()
            _ = loss.item(), (logits.argmax(1) == y).sum().item()  # for a progress bar
        yield


def train(arch: str, device: torch.device, images: int, kind: str) -> Iterator:
    """An epoch of experiment 1 by `utils.training`; the kind is "bf16" or "bf16, no graphs"."""
    training.as_graphs = (lambda model, *_: model) if "no graphs" in kind else training.as_graphs
    model, data = build_model(arch, 1, 2).to(device), torch.randn(images, 1, 32, 32, device=device)
    labels, options = torch.randint(2, (images,), device=device), RECIPE | {"epochs": 1, "precision": kind[:4]}
    for count in (256, images):
        training.train(model, data[:count], labels[:count], generator=torch.Generator(device), **options)
        yield


def plain_gradient(arch: str, device: torch.device, pixels: int) -> Iterator:
    """Central differences of a network along so many pixels: two batches, autograd's graph left on."""
    point, model = draw_point(seed=SEED).to(device), build_model(arch, 1, 1).eval().to(device)
    for count in (1, pixels):
        shifts = STEP * torch.eye(point.numel(), device=device)[:count].view(-1, *point.shape)
        ((model(point + shifts) - model(point - shifts)) / (2 * STEP)).cpu()
        yield


def networks(arch: str, device: torch.device, number: int) -> Iterator:
    """So many networks with their last layer integrated out; what each is worth in plain gradients, also whitened."""
    point = draw_point(seed=SEED).to(device)
    for numbers in (range(1), range(number)):
        rows = [network_rows(draw(arch, i, point, SEED), point, step=STEP).cpu().double().numpy() for i in numbers]
        yield
    nads, deviations = (ROOT / "NADs" / f"{paper_name(arch)}_{kind}.npy" for kind in ("NADs", "eigenvals"))
    whitening = load_nads(nads, point.numel()).double().numpy().T / (load_array(deviations) / AUTHORS_SCALE**0.5)
    yield variance_reduction(rows), variance_reduction([g @ whitening for g in rows], squared_norm=point.numel())


def variance_reduction(rows: list[np.ndarray], squared_norm: float | None = None) -> float:
    """E‖g gᵀ − C‖² / E‖C_n − C‖²: how many sampled gradients g estimate C as well as one network's C_n = Gᵀ G.

    `rows` are the G (F, D) of several networks, and g = Gᵀ u with u uniform of variance 1. ‖C‖² may be known.
    """
    own = np.mean([np.square(g @ g.T).sum() for g in rows])  # E‖C_n‖²
    norm = squared_norm or np.mean([np.square(a @ b.T).sum() for i, a in enumerate(rows) for b in rows[:i]])
    draws = [np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, (200, len(g))) @ g for g in rows]  # 200 g each
    fourth = np.mean([np.square(g).sum(1) ** 2 for g in draws])  # E‖g‖⁴ = E‖g gᵀ‖²
    return float((fourth - norm) / (own - norm))


def predicted_map(arch: str, device: torch.device) -> Iterator:
    """The map predicted from one network, the first of its process."""
    directions = torch.stack(list(fourier_map().values())).to(device)
    yield
    yield squared_differences(directions, arch=arch, num_networks=1, seed=SEED)


def in_processes(number: int, warm_up: float, measurement: Callable, *args: object) -> list[float]:
    """The mean seconds of so many processes by their number, and the numbers; several begin `warm_up` s from now."""
    threads, start = max(1, workers.num_cores() // number), time.time() + warm_up if number > 1 else 0
    with ProcessPoolExecutor(number, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_timed, *zip(*number * [(threads, start, measurement, *args)], strict=True)))
    return [sum(seconds for seconds, *_ in found) / number**2, *found[0][1:]]


def _timed(threads: int, start: float, measurement: Callable, *args: object) -> list[float]:
    multiprocessing.set_start_method(None, force=True)  # the workers of a DataLoader start as they do elsewhere
    torch.set_num_threads(threads)
    steps = measurement(*args)
    next(steps)
    if start and time.time() > start:
        print(f"a process begins {time.time() - start:.1f} s late: use a longer --warm-up", file=sys.stderr)
    time.sleep(max(0.0, start - time.time()))
    begin = time.perf_counter()
    next(steps)
    return [time.perf_counter() - begin, *next(steps, ())]
