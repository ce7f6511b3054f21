"""Random crops and flips of whole batches, against one image at a time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_lightning.data import ShuffledBatches
from zo_lightning.data.augmentation import PADDING, crop_and_flip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_image_is_a_crop_of_the_padded_one_or_of_its_mirror_image() -> None:
    images = torch.randint(1, 256, (64, 3, 6, 5), generator=seeded(0), dtype=torch.uint8)
    before, seen = images.clone(), set()
    for image, found in zip(images, crop_and_flip(images, seeded(1)), strict=True):
        padded = F.pad(image, [PADDING] * 4)
        places = [
            (down, right, flipped)
            for down in range(2 * PADDING + 1)
            for right in range(2 * PADDING + 1)
            for flipped in (False, True)
            if torch.equal(_crop(padded, down, right, flipped), found)
        ]
        assert places, "none of its crops"
        seen.add(places[0])
    assert torch.equal(images, before)
    assert {flipped for _, _, flipped in seen} == {False, True}
    assert len({place[:2] for place in seen}) > 30  # of 81, by 64 draws: 44 are expected


def _crop(padded: Tensor, down: int, right: int, flipped: bool) -> Tensor:
    part = padded[:, down : down + 6, right : right + 5]
    return part.flip(2) if flipped else part


def test_seed_epoch_and_batch_decide_the_changes_so_that_a_run_resumes_exactly() -> None:
    images, labels = torch.rand(20, 1, 8, 8, generator=seeded(2)), torch.arange(20)

    def batches(seed: int) -> ShuffledBatches:
        return ShuffledBatches(images, labels, 8, seed, augmentation=crop_and_flip)

    first = batches(3)
    epochs = [list(first) for _ in range(2)]
    resumed = batches(3)
    resumed.load_state_dict({"epoch": 1, "position": 1})
    for (x, y), (again, same) in zip(epochs[1][1:], resumed, strict=True):
        assert torch.equal(x, again) and torch.equal(y, same)
    order, moved = torch.cat([y for _, y in epochs[0]]).argsort(), torch.cat([y for _, y in epochs[1]]).argsort()
    assert not torch.equal(torch.cat([x for x, _ in epochs[0]])[order], torch.cat([x for x, _ in epochs[1]])[moved])
