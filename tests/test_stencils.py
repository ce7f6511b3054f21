import math

import pytest

from zo_lightning.stencils import CentralDifference, ForwardDifference, Stencil


def f(x: float) -> float:
    return 1 + 3 * x + 5 * x**2


@pytest.mark.parametrize(
    ("stencil", "expected"), [(ForwardDifference(0.1), 3 + 5 * 0.1), (CentralDifference(0.1), 3.0)]
)
def test_slope_of_a_parabola(stencil: Stencil, expected: float) -> None:
    """The forward difference errs by μ f″/2, the central one not at all."""
    assert stencil.slope([f(o * stencil.mu) for o in stencil.offsets]) == pytest.approx(expected)


@pytest.mark.parametrize("stencil", [ForwardDifference(), CentralDifference()])
def test_coefficients_are_consistent(stencil: Stencil) -> None:
    assert sum(stencil.coefficients) == 0
    assert sum(w * o for w, o in zip(stencil.coefficients, stencil.offsets, strict=True)) == 1


@pytest.mark.parametrize("mu", [0.0, -1e-3, math.nan, math.inf])
def test_bad_mu(mu: float) -> None:
    with pytest.raises(ValueError, match="mu must be a positive finite number"):
        CentralDifference(mu)
