"""Random changes of training images that leave their labels true, for a whole batch at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = 4


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images ``(N, C, H, W)`` moved by up to four pixels each way, and mirrored left to right every second time.

    Each image is padded with four zeros on every side, and a part of its own size is cut out of that at random.
    Source: Lee, Xie, Gallagher, Zhang and Tu, *Deeply-supervised nets*, 2015, as in He et al. for CIFAR-10.

    Args:
        images: On the CPU, of any type; they stay as they are.
        generator: Decides the moves.
    """
    n, channels, height, width = images.shape
    down, right = torch.randint(2 * PADDING + 1, (2, n, 1), generator=generator)
    is_flipped = torch.randint(2, (n, 1), generator=generator).bool()
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(is_flipped, columns.flip(1), columns)
    pixels = rows[:, :, None] * (width + 2 * PADDING) + columns[:, None, :]
    padded = F.pad(images, [PADDING] * 4).flatten(2)
    return padded.gather(2, pixels.flatten(1)[:, None].expand(n, channels, -1)).view(images.shape)
