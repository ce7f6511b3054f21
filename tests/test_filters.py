import torch
from torch import nn

from zo_lightning.filters import filter_grid, filters_of


def test_grey_filters_of_one_channel_fill_a_grid() -> None:
    filters = torch.tensor([-1.0, 0.0, 0.5, 1.0, 9.0]).view(5, 1, 1, 1).expand(-1, -1, 3, 3)
    image = filter_grid(filters, scale=1.0)
    assert image.shape == (1, 52, 5 * 50 + 2)  # 5 filters in a row, 48 pixels each and lines of 2
    assert [round(float(image[0, 20, 20 + 50 * i]), 3) for i in range(5)] == [0.0, 0.5, 0.75, 1.0, 1.0]
    assert filter_grid(filters.expand(-1, -1, 3, 3).repeat(3, 1, 1, 1), 1.0).shape == (1, 202, 202)  # 15: four by four


def test_rgb_and_deeper_filters() -> None:
    filters = torch.zeros(4, 3, 5, 5)
    filters[1, 2] = 1.0
    colour = filter_grid(filters, 1.0)
    assert colour.shape == (3, 49, 4 * 47 + 2)
    assert colour[:, 20, 47 + 20].tolist() == [0.5, 0.5, 1.0]
    by_channel = filter_grid(filters, 1.0, rgb=False)
    assert by_channel.shape == (1, 4 * 47 + 2, 3 * 47 + 2)  # a row per filter, a column per channel
    assert by_channel[0, 47 + 20, 2 * 47 + 20] == 1.0
    assert (by_channel == 1.0).sum() == 45 * 45 + by_channel.numel() - 12 * 45 * 45  # one white square, and the lines


def test_convolutions_are_found_once_and_in_order() -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 5), nn.Linear(4, 4), nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3))
    module[3].weight = module[2].weight
    assert {name: tuple(w.shape) for name, w in filters_of(module).items()} == {
        "0.weight": (3, 2, 1, 5),
        "2.weight": (2, 1, 3, 3),
    }


def test_every_filter_in_its_own_range() -> None:
    filters = torch.zeros(3, 1, 2, 2)
    filters[0, 0, 0] = 1e-6
    filters[1] = 5.0
    filters[1, 0, 0, 0] = -3.0
    image = filter_grid(filters, scale=None)[0]  # tiles of 48 pixels, lines of 2
    at = (10, 50 + 10, 100 + 10)
    assert [float(image[10, left]) for left in at] == [1.0, 0.0, 0.0]
    assert [float(image[40, left]) for left in at] == [0.0, 1.0, 0.0]  # one that is constant is black
