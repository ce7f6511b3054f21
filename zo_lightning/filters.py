"""Convolution filters: where they are in a net, and pictures of them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LINE = 1.0  # the lines between the filters are white
_SIDE = 48  # pixels of a filter's side, at least


def filters_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of all convolutions of one and two dimensions, [n, channels, height, width], by name, once each."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = {}
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and isinstance(weight, Tensor) and id(weight) in names:
            found[names[id(weight)]] = weight if weight.ndim == 4 else weight.unsqueeze(2)
    return found


def filter_grid(filters: Tensor, scale: float | None, rgb: bool = True) -> Tensor:
    """Filters [n, c, h, w] as one image, [1 or 3, H, W] in [0, 1].

    With c = 1, or c = 3 and ``rgb``, the filters fill a grid; otherwise each is a row of its c channels.

    Args:
        filters: their weights.
        scale: weights of ``-scale`` are black, of ``scale`` white; None gives each filter its own range of greys.
        rgb: three channels are colours.
    """
    if scale is None:
        low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
        values = (filters - low) / (high - low).clamp_min(torch.finfo(filters.dtype).tiny)
    else:
        values = (filters / (2 * scale) + 0.5).clamp(0, 1)
    enlarge = max(1, _SIDE // max(filters.shape[2:]))
    values = F.interpolate(values, scale_factor=enlarge, mode="nearest")
    n, c, h, w = values.shape
    in_colour = c == 3 and rgb
    columns = (n if n <= 8 else math.ceil(math.sqrt(n))) if c == 1 or in_colour else c
    tiles = values if in_colour else values.reshape(n * c, 1, h, w)
    rows = math.ceil(len(tiles) / columns)
    image = torch.full((tiles.shape[1], rows * (h + 2) + 2, columns * (w + 2) + 2), _LINE)
    for position, tile in enumerate(tiles):
        top, left = 2 + position // columns * (h + 2), 2 + position % columns * (w + 2)
        image[:, top : top + h, left : left + w] = tile
    return image
