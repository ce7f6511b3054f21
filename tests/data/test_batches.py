"""Batches sliced from memory: content, order, sharding, state."""

import pytest
import torch

from zo_lightning.data.batches import ShuffledBatches, TensorBatches, random_stream

N = 50
IMAGES = torch.arange(N, dtype=torch.uint8).reshape(N, 1, 1, 1)
LABELS = torch.arange(N)


def labels(batches: TensorBatches) -> list[list[int]]:
    return [y.tolist() for _, y in batches]


def shuffled(seed: int = 0, epoch: int = 0) -> ShuffledBatches:
    batches = ShuffledBatches(IMAGES, LABELS, 8, seed)
    batches.set_epoch(epoch)
    return batches


def test_every_image_comes_once_with_its_label_and_scaled() -> None:
    for batches in (TensorBatches(IMAGES, LABELS, 8), shuffled()):
        seen = list(batches)
        assert len(seen) == len(batches) == 7
        assert [len(y) for _, y in seen] == [8] * 6 + [2]
        assert torch.equal(torch.cat([y for _, y in seen]).sort().values, LABELS)
        for x, y in seen:
            assert x.dtype == torch.float32
            assert torch.equal(x.flatten(), y / 255)


def test_float_images_come_out_unchanged_and_as_copies() -> None:
    images = torch.rand(5, 1, 2, 2)
    ((x, _),) = TensorBatches(images, torch.zeros(5, dtype=torch.int64), 8)
    assert torch.equal(x, images)
    assert x.data_ptr() != images.data_ptr()


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): shuffled(seed, epoch).order().tolist() for seed in range(4) for epoch in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 16
    torch.manual_seed(5)
    assert all(shuffled(*key).order().tolist() == order for key, order in orders.items())
    # To notice where another process, version or machine has another order.
    assert orders[0, 0][:5] == [16, 22, 24, 17, 11]
    assert orders[1, 2][:5] == [4, 21, 15, 36, 23]


def test_random_streams_differ_in_every_number() -> None:
    keys = [("a", 0), ("a", 1), ("b", 0), ("a", 2**32 - 1), ("a", 0, 1), ("a", 1, 0), ("a", 1, 1)]
    draws = {tuple(torch.randint(2**31, (4,), generator=random_stream(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_complete_passes_move_on_and_peeking_does_not() -> None:
    batches = shuffled()
    next(iter(batches))
    assert labels(batches) == labels(shuffled(epoch=0))
    assert labels(batches) == labels(shuffled(epoch=1))


@pytest.mark.parametrize("position", range(8))
def test_state_resumes_at_the_next_batch_and_only_in_its_epoch(position: int) -> None:
    whole = labels(shuffled(epoch=3))
    interrupted = shuffled(epoch=3)
    for _ in zip(range(position), interrupted, strict=False):
        pass
    state = interrupted.state_dict()
    assert state == {"epoch": 3, "position": position}

    resumed = shuffled()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert labels(resumed) == whole[position:]
    assert labels(resumed) == labels(shuffled(epoch=4))

    elsewhere = shuffled()
    elsewhere.load_state_dict(state)
    elsewhere.set_epoch(4)
    assert labels(elsewhere) == labels(shuffled(epoch=4))


def test_order_and_start_follow_the_progress_given() -> None:
    where: tuple[int, int] | None = (3, 2)
    batches = ShuffledBatches(IMAGES, LABELS, 8, 0, progress=lambda: where)
    iterator = iter(batches)
    where = (4, 5)
    assert [y.tolist() for _, y in iterator] == labels(shuffled(epoch=4))[5:]
    where = None
    assert labels(batches) == labels(shuffled(epoch=5))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_together_see_the_batches_of_one_process(world_size: int) -> None:
    one = labels(ShuffledBatches(IMAGES, LABELS, 9, 7))
    per_rank = [
        labels(ShuffledBatches(IMAGES, LABELS, 9, 7, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert [sorted(sum(parts, [])) for parts in zip(*per_rank, strict=True)] == [sorted(batch) for batch in one]


def test_empty_shards_lengths_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=8 gives a batch of 2 images, too few for 4 processes"):
        TensorBatches(IMAGES, LABELS, 8, rank=0, world_size=4)
    with pytest.raises(ValueError, match="50 images but 49 labels"):
        TensorBatches(IMAGES, LABELS[1:], 8)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        TensorBatches(IMAGES, LABELS, 0)
    with pytest.raises(ValueError, match="rank=2 must lie between 0 and world_size - 1 = 1"):
        TensorBatches(IMAGES, LABELS, 8, rank=2, world_size=2)
