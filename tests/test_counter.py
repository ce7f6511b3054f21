"""Philox against its published answers and a slow twin; numbers against the distributions they stand for."""

import math

import pytest
import torch

from zo_lightning import counter
from zo_lightning.counter import Stream, mix, philox

CPU = torch.device("cpu")
WORD = (1 << 64) - 1
PI = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89, 0x452821E638D01377)
# Random123's kat_vectors (Salmon et al. 2011), "philox4x64 10": counter, key, answer.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    ((WORD,) * 4, (WORD,) * 2, (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
    (
        PI[:4],
        (PI[4], 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
)


def slow_philox(words: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    a, b, c, d = words
    k, m = key
    for _ in range(10):
        first, second = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (second >> 64) ^ b ^ k, second & WORD, (first >> 64) ^ d ^ m, first & WORD
        k, m = (k + 0x9E3779B97F4A7C15) & WORD, (m + 0xBB67AE8584CAA73B) & WORD
    return a, b, c, d


def signed(words: tuple[int, ...]) -> list[int]:
    return [word - (1 << 64) if word >> 63 else word for word in words]


@pytest.mark.parametrize(("words", "key", "answer"), KNOWN)
def test_published_answers(words: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert slow_philox(words, key) == answer
    assert philox(torch.tensor(signed(words)).unsqueeze(1), key).flatten().tolist() == signed(answer)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -1, 2**70 + 5])
@pytest.mark.parametrize(("step", "index", "block"), [(0, 0, 0), (3, 2, 0), (-1, 2**63 + 1, 7), (2**40, 1, 2**33)])
def test_words_of_every_device_are_those_of_the_slow_twin(
    seed: int, step: int, index: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [
        word
        for place in range(block, block + 3)
        for word in signed(slow_philox((place, index & WORD, 0, 0), (seed & WORD, step & WORD)))
    ]
    stream = Stream(seed, step, index)
    assert stream.words(block, 10, CPU).tolist() == expected[:10]
    counters = torch.tensor([signed((place, index & WORD, 0, 0)) for place in range(block, block + 3)]).T
    assert philox(counters, (seed, step)).T.flatten().tolist() == expected
    monkeypatch.setattr(counter, "_COPIED", 0)
    assert stream.words(block, 10, torch.device("meta")).shape == (10,), "the way of other devices"


def test_a_part_of_a_stream_is_the_same_by_itself() -> None:
    stream = Stream(1, 2, 3)
    for draw in (stream.signs, stream.normals):
        whole, part = torch.empty(2003), torch.empty(403)
        draw(whole, 0)
        draw(part, 512)
        assert torch.equal(part, whole[512:915])


def test_streams_of_neighbouring_keys_are_unrelated() -> None:
    keys = [(seed, step, index) for seed in range(4) for step in range(4) for index in range(4)]
    signs = torch.empty(len(keys), 4096)
    for key, row in zip(keys, signs, strict=True):
        Stream(*key).signs(row, 0)
    # The mean of 4096 products of signs has standard deviation 1/64: six of them, over 2016 pairs.
    assert (signs @ signs.T / 4096 - torch.eye(len(keys))).abs().max() < 6 / 64


def test_normal_numbers_are_normal() -> None:
    z = torch.empty(1 << 20)
    Stream(0, 0, 0).normals(z, 0)
    z = z.double().sort().values
    # Kolmogorov and Smirnov: √n times the largest distance exceeds 1.95 once in a thousand times.
    normal = torch.special.ndtr(z)
    distance = (normal - torch.arange(len(z)) / len(z)).abs().max()
    assert distance * math.sqrt(len(z)) < 1.95 + math.sqrt(len(z)) / 65536  # each of 65,536 values is a step
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):  # spread: Var z^power
        assert float(z.pow(power).mean()) == pytest.approx(moment, abs=5 * math.sqrt(spread / len(z)))


def test_the_values_of_normal_numbers_have_mean_0_and_variance_1() -> None:
    values = counter._quantiles(CPU, torch.float32).double()
    assert float(values.sum()) == 0
    assert float(values.square().mean()) == pytest.approx(1, abs=1e-7)
    assert 4.2 < float(values.max()) < 4.4


def test_signs_are_half_of_each() -> None:
    signs = torch.empty(1 << 20)
    Stream(0, 0, 0).signs(signs, 0)
    assert abs(float(signs.mean())) < 5 / 1024
    # Of each bit of a byte, and of neighbours.
    assert signs.view(-1, 8).mean(0).abs().max() < 5 * math.sqrt(8) / 1024
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 5 / 1024


def test_mix_depends_on_the_order() -> None:
    keys = [mix(seed, step, index) for seed in range(8) for step in range(8) for index in range(8)]
    assert len(set(keys)) == len(keys)
    assert mix(1, 2) != mix(2, 1)
