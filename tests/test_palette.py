"""Figures can be read: on white, and by every kind of colour vision."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from zo_lightning.palette import COLOURS, MARKERS, contrast_to_white, ordered

# Machado, Oliveira & Fernandes (2009), severity 1: what somebody without one kind of cones sees, in linear RGB.
SEEN_BY = {
    "everybody": np.eye(3),
    "no red": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "no green": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9690]]),
    "no blue": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIELAB of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(seen @ linear, 0, 1) / WHITE)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN_BY.values(), ids=SEEN_BY)
def test_colours_are_told_apart(seen: np.ndarray) -> None:
    """A difference of 2.3 is just seen side by side; 10 is clear apart. The cube root is CIELAB's above black."""
    places = [lab(colour, seen) for colour in COLOURS]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(places, 2)) > 10
    assert len(set(MARKERS)) == len(COLOURS)


@pytest.mark.parametrize("colour", [*COLOURS, *ordered(11), *ordered(1)])
def test_lines_are_seen_on_white(colour: str) -> None:
    """WCAG 2 asks for 3 for graphics."""
    assert contrast_to_white(colour) >= 3.5


@pytest.mark.parametrize("seen", SEEN_BY.values(), ids=SEEN_BY)
def test_what_has_an_order_is_lighter_and_lighter(seen: np.ndarray) -> None:
    lightness = [lab(colour, seen)[0] for colour in ordered(11)]
    assert all(a < b for a, b in pairwise(lightness))
