"""Squared error of the best 2-bit grid on Gaussian weights: two's complement against balanced levels.

python benchmarks/two_bit_grid.py
"""

from __future__ import annotations

import torch

from tracequant.quantization.grid import Grid

VALUES = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))


def best_error(zero_point: float) -> tuple[float, float]:
    """The least mean squared error over scales, and the scale that gives it."""
    trials = []
    for step in range(20, 300):
        scale = torch.tensor(step / 100)
        error = (Grid(scale, torch.tensor(zero_point), 2).round(VALUES) - VALUES).square().mean()
        trials.append((error.item(), scale.item()))
    return min(trials)


def main() -> None:
    """Print both errors and their ratio."""
    complement, balanced = best_error(2.0), best_error(1.5)
    print("2-bit grid on 1,000,000 standard normal values")
    print(f"  two's complement {{-2, -1, 0, 1}} s    mean squared error {complement[0]:.4f} at s = {complement[1]:.2f}")
    print(f"  balanced {{-3, -1, 1, 3}} s/2         mean squared error {balanced[0]:.4f} at s = {balanced[1]:.2f}")
    print(f"  the two's complement grid's error is {complement[0] / balanced[0] - 1:.1%} larger")


if __name__ == "__main__":
    main()
