"""What has been summed over the random networks drawn so far: on one rank, on all, and from one command to the next."""

from dataclasses import dataclass
from pathlib import Path

import torch

from utils import distributed, runs
from utils.covariance import GradientSum, nads_from_covariance, subspace_overlap
from utils.last_layer import weight_variance


@dataclass
class Drawn:
    """What has been summed over the networks drawn so far; even and odd networks apart, to see how they agree."""

    halves: tuple[GradientSum, GradientSum]
    weights: torch.Tensor  # (5,), see weight_statistics; zeros for the sampled estimator
    numbers: set[int]

    def covariance(self, halves: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        """The covariance (D, D) of the gradient from both halves or one of them."""
        total = GradientSum(len(self.halves[0].rows))
        for half in halves:
            total.merge(self.halves[half])
        if self.weights.any():
            return total.marginal_covariance(weight_variance(self.weights))
        return total.sampled_covariance()

    def agreement(self, k: int) -> float:
        """Overlap of the first k NADs of the even with those of the odd networks."""
        return subspace_overlap(*(nads_from_covariance(self.covariance((half,))).directions for half in (0, 1)), k)


def nothing_drawn(dimension: int, device: torch.device | str = "cpu") -> Drawn:
    """Empty sums for images of this dimension."""
    halves = (GradientSum(dimension, device), GradientSum(dimension, device))
    return Drawn(halves, torch.zeros(5, dtype=torch.float64), set())


def save_part(path: Path, drawn: Drawn) -> None:
    """Write one rank's sums."""
    halves = [half.state() for half in drawn.halves]
    runs.save_checkpoint(path, {"halves": halves, "weights": drawn.weights, "numbers": sorted(drawn.numbers)})


def load_part(path: Path, dimension: int, device: torch.device | str = "cpu") -> Drawn:
    """Read one rank's sums; empty ones where there is no file."""
    if not path.exists():
        return nothing_drawn(dimension, device)
    state = runs.load_checkpoint(path)
    try:
        even, odd = (GradientSum.from_state(half, device) for half in state["halves"])
        drawn = Drawn((even, odd), state["weights"].reshape(5), set(state["numbers"]))
        whole = even.num_networks + odd.num_networks == len(drawn.numbers) and len(even.rows) == dimension
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"the checkpoint {path} does not hold what it should: delete it to start again")
    return drawn


def read_parts(folder: Path, point: torch.Tensor, num_networks: int) -> tuple[Drawn, list[Drawn], set[int]]:
    """What earlier commands left: this rank's sums, those that no rank continues (for rank 0), all numbers done."""
    rank, size = distributed.rank(), distributed.world_size()
    mine = load_part(folder / f"part-{rank}.pt", point.numel(), point.device)
    done, left_over = set(mine.numbers), []
    for path in sorted(folder.glob("part-*.pt")):
        other = int(path.stem.removeprefix("part-"))
        if other != rank:
            part = load_part(path, point.numel())
            done |= part.numbers
            if other >= size and rank == 0:
                left_over.append(part)
    if done and max(done) >= num_networks:
        raise ValueError(f"{folder} has networks up to number {max(done)}: ask for {max(done) + 1} or more")
    return mine, left_over, done


def sum_of_all(mine: Drawn, others: list[Drawn]) -> Drawn:
    """What all ranks have drawn; `others` are parts that no rank of this run continues, known to rank 0 alone."""
    halves = []
    for half in (0, 1):
        state = mine.halves[half].state()
        for other in others:
            state = state + other.halves[half].state()
        halves.append(GradientSum.from_state(distributed.sum_over_ranks(state)))
    weights = distributed.sum_over_ranks(torch.stack([mine.weights, *(other.weights for other in others)]).sum(0))
    return Drawn((halves[0], halves[1]), weights, set())
