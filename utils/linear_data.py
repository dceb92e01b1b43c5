"""The distribution D(v): data separable along one direction v, and along no other (paper, section 2)."""

import torch


def sample_linear_data(
    direction: torch.Tensor,
    num_samples: int,
    *,
    epsilon: float = 1.0,
    sigma: float = 3.0,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x = y·ε·v + (I − v vᵀ)·w with w ~ N(0, σ²I) and y = ±1, for a unit vector v (C, H, W).

    Returns images (n, C, H, W) on the device of v, and labels (n,), 0 where y = +1, 1 where y = −1: one half (of an odd
    number, the larger) after the other.
    """
    v = direction.flatten()
    labels = (torch.arange(num_samples, device=v.device) >= (num_samples + 1) // 2).long()
    target = epsilon * (1 - 2 * labels).to(v.dtype)  # y·ε
    x = sigma * torch.randn(num_samples, v.numel(), generator=generator, device=v.device, dtype=v.dtype)
    for _ in range(2):  # the second pass removes the rounding error of the first
        x += torch.outer(target - x @ v, v)
    return x.view(num_samples, *direction.shape), labels
