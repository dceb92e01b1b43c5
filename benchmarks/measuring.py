"""The two ways of each experiment, timed, in processes of their own: each has its threads and its peak memory alone."""

import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plain import gradient_plainly, train_plainly
from directional_bias import RECIPE
from models import build_model
from nad_computation import STEP, draw_point
from predict import squared_differences
from utils import convolution, distributed
from utils import training as recipe
from utils.directions import fourier_map
from utils.last_layer import draw_network, network_rows

SEED = 1  # not that of the arrays in NADs/: their covariance and the networks here are independent
PATIENCE = 600  # seconds for the others' warm-up: one that has failed does not come
PLAIN_PIXELS = {"densenet121": 128}  # all 1,024 with their graph take some 50 GB
wait_for_all: Callable[[], int]  # called after its warm-up by each of the processes that measure at once


def how_many_at_once(arch: str, device: torch.device) -> int:
    """The processes that the scripts start for a network: one on each core for a small one (`distributed.launch`)."""
    return distributed.num_cores() if distributed.is_small(build_model(arch, 1, 1), device) else 1


def in_processes(number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call the function in so many new processes at once, which share the cores, and return what they return."""
    context = multiprocessing.get_context("spawn")
    threads, together = max(1, distributed.num_cores() // number), context.Barrier(number, timeout=PATIENCE)
    with ProcessPoolExecutor(number, context, _enter, (threads, together)) as pool:
        return [future.result() for future in [pool.submit(function, *args) for _ in range(number)]]


def _enter(threads: int, together: Barrier) -> None:
    multiprocessing.set_start_method(None, force=True)  # a DataLoader's workers start as they do elsewhere
    torch.set_num_threads(threads)
    global wait_for_all
    wait_for_all = together.wait


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, in GB: of this process, or on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text()  # not getrusage, whose peak is inherited
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6


def training(
    arch: str, steps: int, device: torch.device, precision: str | None, faster: bool = True
) -> tuple[float, float]:
    """Images a second and peak memory of experiment 1; the plain way, in fp32, where there is no precision.

    Not `faster`: small convolutions in bf16 on a CPU are left to torch, a GPU's kernels are launched one by one.
    """
    if not faster:  # in this process
        convolution.MAX_PIXELS, recipe.as_graphs = 0, lambda model, *_: model
    model = build_model(arch, 1, 2).to(device)
    images = torch.randn(steps * RECIPE["batch_size"], 1, 32, 32, device=device if precision else "cpu")
    labels = torch.randint(2, (len(images),), device=images.device)
    here = partial(recipe.train, precision=precision, generator=torch.Generator(device).manual_seed(0))
    run = partial(here if precision else train_plainly, model, **RECIPE | {"epochs": 1})
    run(images[:256], labels[:256])  # chooses algorithms and touches memory for the first time
    wait_for_all()
    start = time.perf_counter()
    run(images, labels)
    return len(images) / (time.perf_counter() - start), peak_memory(device)


def plain_gradient(arch: str, device: torch.device) -> tuple[float, float]:
    """Seconds and peak memory of one gradient the plain way; of some of its pixels, where all do not fit."""
    point, model = draw_point(seed=SEED).to(device), build_model(arch, 1, 1).eval().to(device)
    pixels = PLAIN_PIXELS.get(arch, point.numel())
    gradient_plainly(model, point, pixels=1)  # the first time is slow
    start = time.perf_counter()
    gradient_plainly(model, point, pixels=pixels).cpu()
    return (time.perf_counter() - start) * point.numel() / pixels, peak_memory(device)


def marginal_networks(arch: str, device: torch.device, networks: int) -> tuple[float, float, list[np.ndarray]]:
    """Seconds a network here, its drawing included, and peak memory; and the rows (F, D) of each network."""
    point, rows, seconds = draw_point(seed=SEED).to(device), [], []
    wait_for_all()
    for number in range(networks):
        start = time.perf_counter()
        network = draw_network(lambda: build_model(arch, 1, 1), device, SEED, "network", number)
        rows.append(network_rows(network, point, step=STEP).cpu().double().numpy())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), peak_memory(device), rows


def variance_reduction(rows: list[np.ndarray], squared_norm: float | None = None) -> float:
    """E‖g gᵀ − C‖² / E‖C_n − C‖²: how many sampled gradients g estimate C as well as one network's marginal C_n.

    C_n = Gᵀ G, with the `rows` G (F, D) of networks drawn independently, and g = Gᵀ u with u uniform of variance 1.
    ‖C‖² is estimated from pairs of networks unless it is known.
    """
    rng = np.random.default_rng(0)
    own = np.mean([np.square(g @ g.T).sum() for g in rows])  # E‖C_n‖²
    if squared_norm is None:  # E tr C_n C_m
        squared_norm = np.mean([np.square(a @ b.T).sum() for i, a in enumerate(rows) for b in rows[:i]])
    draws = [rng.uniform(-(3**0.5), 3**0.5, (200, len(g))) @ g for g in rows]  # 200 g each
    fourth = np.mean([np.square(g).sum(1) ** 2 for g in draws])  # E‖g‖⁴ = E‖g gᵀ‖²
    return float((fourth - squared_norm) / (own - squared_norm))


def predicted_map(arch: str, device: torch.device) -> tuple[float, int]:
    """Seconds of the predicted map from one network, the first of its process, and its number of directions."""
    directions = torch.stack(list(fourier_map().values())).to(device)
    start = time.perf_counter()
    squared_differences(directions, arch=arch, num_networks=1, seed=SEED)
    return time.perf_counter() - start, len(directions)
