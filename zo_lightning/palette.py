"""The colours of all figures: dark enough for thin lines on white, and told apart by every kind of colour vision."""

from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb

COLOURS = ("#0072B2", "#C44E00", "#00805E", "#A2438A", "#5C4B00", "#7A5AF0", "#C8003C", "#000000")
"""For things without an order. Hues and order are those of Okabe and Ito (2008), darker; markers tell the rest."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One for each colour."""

_ORDERED = LinearSegmentedColormap.from_list("sizes", ("#1B1044", "#6A1C81", "#C2306F", "#D9600F"))


def ordered(count: int) -> list[str]:
    """Colours of things that have an order, such as sizes, from dark to light."""
    return [to_hex(_ORDERED(index / max(1, count - 1))) for index in range(count)]


def contrast_to_white(colour: str) -> float:
    """The contrast ratio of a colour to white (WCAG 2, relative luminance); 3 is the least for lines and marks."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
