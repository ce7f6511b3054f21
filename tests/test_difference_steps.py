"""The step at which slopes agree best, of functions whose best step is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zo_lightning.difference_steps import GRID, RATIO, StepScan


def central(f: Callable[[Tensor], Tensor], count: int = 400) -> StepScan:
    """Slopes at 0 by central differences, of ``count`` functions at once."""
    scan = StepScan()
    scan.add([(f(torch.full((count,), mu).double()) - f(torch.full((count,), -mu).double())) / (2 * mu) for mu in GRID])
    return scan


def test_noise_and_curvature_are_balanced() -> None:
    """For x + c x³ + noise of deviation s the error s² / 2μ² + c² μ⁴ is smallest at μ⁶ = s² / 4c²."""
    generator = torch.Generator().manual_seed(0)
    for s, c in ((1e-3, 100.0), (1e-4, 1.0), (3e-2, 3.0)):
        scan = central(lambda x, s=s, c=c: x + c * x**3 + s * torch.randn(len(x), generator=generator).double())
        best = (s / (2 * c)) ** (1 / 3)

        def true(mu: float, s: float = s, c: float = c) -> float:
            return math.sqrt(s**2 / (2 * mu**2) + c**2 * mu**4)

        assert scan.best is not None and scan.agrees
        # The grid has a step within a factor √r of the best, whose error is at most √r times as large.
        assert true(scan.best) <= max(0.1, RATIO**0.5 * true(best))


def test_error_is_measured() -> None:
    """Where rounding is all there is, the error at μ is s / (√2 μ): 400 squares tell it to 15 %."""
    generator = torch.Generator().manual_seed(0)
    scan = central(lambda x: x + 1e-4 * torch.randn(len(x), generator=generator).double(), count=400)
    for mu, error in list(zip(GRID, scan.errors, strict=True))[6:9]:  # 1e-3 to 1e-2: smaller than the slopes
        # The change to the step above is rounding too, and counts as truncation: 1/r² more over (r - 1)².
        expected = 1e-4 / (math.sqrt(2) * mu) * math.sqrt(1 + (1 + 1 / RATIO**2) / (RATIO - 1) ** 2)
        assert error == pytest.approx(expected, rel=0.15)


def test_float32_losses_want_a_step_between_rounding_and_curvature() -> None:
    scale = torch.linspace(0.5, 2, 400).double()

    def loss(x: Tensor) -> Tensor:
        return (2.3 + 0.3 * scale * x + 5 * x**3).float().double()  # an epsilon of 2.4e-7

    scan = central(loss)
    slopes = (
        loss(torch.full((400,), scan.best or 0).double()) - loss(torch.full((400,), -(scan.best or 0)).double())
    ) / (2 * (scan.best or 1))
    assert float(((slopes - 0.3 * scale) / (0.3 * scale)).square().mean().sqrt()) < 0.1


def test_upper_of_good_steps_is_taken() -> None:
    """A quadratic has no error of truncation, and float64 none of rounding: all but the ends of the grid are good."""
    assert central(lambda x: x + x**2).best == 0.1 == GRID[1:-1][9]


def test_jumps_want_a_step_that_crosses_many() -> None:
    """A slope of 1 in stairs of height h, each beginning elsewhere: a step below h mostly sees nothing, or all."""
    phase = torch.rand(400, generator=torch.Generator().manual_seed(0)).double()
    for h in (1e-3, 1e-2):
        scan = central(lambda x, h=h: h * torch.floor(x / h + phase) + x**3)
        assert scan.best is not None and scan.best > h
        assert all(error > 0.5 for mu, error in zip(GRID, scan.errors, strict=True) if mu < h / RATIO)


def test_constant_or_infinite_losses_have_no_step() -> None:
    flat = central(torch.zeros_like)
    assert flat.best is None and not flat.agrees
    lost = StepScan()
    lost.add(None for _ in GRID)
    assert lost.best is None


def test_steps_that_reach_infinity_are_left_out() -> None:
    scan = StepScan()
    scan.add(None if mu > 1e-3 else torch.ones(5) for mu in GRID)
    errors = dict(zip(GRID, scan.errors, strict=True))
    assert errors[3.2e-4] == 0 and errors[1e-3] == math.inf  # for want of a neighbour
    assert scan.best is not None and scan.best <= 3.2e-4


def test_noise_without_slope_agrees_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not central(lambda x: torch.randn(len(x), generator=generator).double()).agrees
