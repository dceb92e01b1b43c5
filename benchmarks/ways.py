"""The two ways of each experiment, the repository's and the plain one, timed. One function for each, in one process."""

import time
from functools import partial

import numpy as np
import torch

from benchmarks.measuring import peak_memory
from benchmarks.plain import gradient_plainly, train_plainly
from directional_bias import RECIPE, variance_along
from models import build_model
from nad_computation import draw_point
from utils import seeding
from utils.directions import fourier_map
from utils.last_layer import draw_network, network_rows
from utils.training import train

SEED = 1  # not that of the arrays in NADs/: their covariance and the networks here are independent
PLAIN_PIXELS = {"densenet121": 128}  # all 1,024 with their graph take some 50 GB
DRAWS = 200  # last layers drawn for each trunk, to average over g


def training(arch: str, steps: int, device: torch.device, precision: str | None) -> tuple[float, float]:
    """Images a second and peak memory (GB) of experiment 1; the plain way (fp32) where there is no precision."""
    model = build_model(arch, 1, 2).to(device)
    images = torch.randn(steps * RECIPE["batch_size"], 1, 32, 32, device=device if precision else "cpu")
    labels = torch.randint(2, (len(images),), device=images.device)
    here = partial(train, precision=precision, generator=torch.Generator(device).manual_seed(0))
    run = partial(here if precision else train_plainly, model, **RECIPE | {"epochs": 1})
    first = 2 * RECIPE["batch_size"]  # chooses algorithms and touches memory for the first time
    run(images[:first], labels[:first])
    start = time.perf_counter()
    run(images, labels)
    return len(images) / (time.perf_counter() - start), peak_memory(device)


def plain_network(arch: str, device: torch.device) -> tuple[float, float]:
    """Seconds and peak memory of one gradient the plain way, the seconds from some of the pixels where few fit."""
    point = draw_point(seed=SEED).to(device)
    pixels = PLAIN_PIXELS.get(arch, point.numel())
    gradient_plainly(build_model(arch, 1, 1).eval().to(device), point, pixels=1)  # the first time is slow
    start = time.perf_counter()
    model = build_model(arch, 1, 1).eval().to(device)
    built = time.perf_counter() - start
    gradient_plainly(model, point, pixels=pixels).cpu()
    return built + (time.perf_counter() - start - built) * point.numel() / pixels, peak_memory(device)


def marginal_networks(arch: str, device: torch.device, networks: int) -> tuple[float, float, list[np.ndarray]]:
    """Seconds a network and peak memory here, and the rows (F, D) of each network."""
    point = draw_point(seed=SEED).to(device)
    rows, seconds = [], []
    for number in range(networks):
        start = time.perf_counter()
        network = draw_network(lambda: build_model(arch, 1, 1), device, SEED, "network", number)
        rows.append(network_rows(network, point).cpu().double().numpy())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), peak_memory(device), rows


def predicted_map(arch: str, device: torch.device) -> tuple[float, int]:
    """Seconds of the predicted map from one network, the first of its process, and its number of directions."""
    directions = torch.stack(list(fourier_map().values())).to(device)
    start = time.perf_counter()
    variance_along(directions, arch=arch, num_networks=1, seed=seeding.seed_of(SEED))
    return time.perf_counter() - start, len(directions)


def variance_reduction(rows: list[np.ndarray], squared_norm: float | None = None) -> float:
    """How many sampled gradients a marginal network is worth: E‖g gᵀ − C‖² / E‖C_n − C‖².

    C_n = Gᵀ G with the rows G (F, D) of a network, and g = Gᵀ u with u uniform of variance 1.

    Args:
        rows: of networks drawn independently.
        squared_norm: ‖C‖² if it is known; else estimated from pairs of networks.
    """
    rng = np.random.default_rng(0)
    own = np.mean([np.square(g @ g.T).sum() for g in rows])  # E‖C_n‖²
    if squared_norm is None:
        pairs = [np.square(a @ b.T).sum() for i, a in enumerate(rows) for b in rows[:i]]
        squared_norm = np.mean(pairs)  # ‖C‖² = E tr C_n C_m
    draws = [rng.uniform(-(3**0.5), 3**0.5, (DRAWS, len(g))) @ g for g in rows]  # (DRAWS, D) each
    fourth = np.mean([np.square(g).sum(1) ** 2 for g in draws])  # E‖g‖⁴ = E‖g gᵀ‖²
    return float((fourth - squared_norm) / (own - squared_norm))
