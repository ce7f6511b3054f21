import pytest
import torch

from zo_lightning import counter
from zo_lightning.centred import Centred
from zo_lightning.directions import Coordinate, Directions, Gaussian, Rademacher, Sphere, hold_all
from zo_lightning.low_rank import LowRank
from zo_lightning.vectors import Vector

CENTRED_SPHERE = Centred(Sphere())


def test_sphere_has_norm_root_d() -> None:
    params = [torch.zeros(30, 10), torch.zeros(7)]
    u = torch.cat([t.flatten() for t in Sphere().draw(params, 0, 0, 0).tensors()])
    assert u.norm().item() == pytest.approx(307**0.5, rel=1e-6)


def test_rademacher_has_two_values_and_coordinate_one_place() -> None:
    params = [torch.zeros(30, 10), torch.zeros(7)]
    signs = torch.cat([t.flatten() for t in Rademacher().draw(params, 0, 0, 0).tensors()])
    assert set(signs.tolist()) == {-1.0, 1.0}
    place = torch.cat([t.flatten() for t in Coordinate().draw(params, 0, 0, 0).tensors()])
    assert place.count_nonzero() == 1
    assert place.max().item() == pytest.approx(307**0.5)


def test_low_rank_has_its_rank() -> None:
    (matrix,) = LowRank(rank=2).draw([torch.zeros(8, 3, 3, 3)], 0, 0, 0).tensors()
    assert torch.linalg.matrix_rank(matrix.view(8, -1)).item() == 2


@pytest.mark.parametrize("of", [Rademacher(), Gaussian(), Sphere(), LowRank(2)], ids=lambda u: type(u).__name__)
def test_rows_of_centred_directions_sum_to_zero(of: Directions) -> None:
    kernel = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weights = [torch.zeros(30, 10), kernel, torch.zeros(4, 6, dtype=torch.complex64), torch.zeros(7)]
    direction = Centred(of).draw(weights, 0, 0, 0)
    drawn = direction.tensors()
    for k, t in enumerate(drawn[:3]):
        assert t.stride() == weights[k].stride()
        # Sums of at most 60 float32 numbers of about 1.
        assert t.flatten(1).sum(1).abs().max().item() < 1e-4
    assert drawn[3].count_nonzero() == 7
    assert all(torch.equal(direction[k], t) for k, t in enumerate(drawn))
    if isinstance(of, Sphere):
        assert sum(t.abs().square().sum().item() for t in drawn) == pytest.approx(direction.d, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("u", [Gaussian(), Sphere(), Rademacher(), Coordinate(), LowRank(), Centred()])
def test_dtype_and_shape_follow_the_weights(u: Gaussian, dtype: torch.dtype) -> None:
    for p, t in zip(
        params := [torch.zeros(3, 2, dtype=dtype), torch.zeros((), dtype=dtype)],
        u.draw(params, 0, 0, 0).tensors(),
        strict=True,
    ):
        assert (t.dtype, t.shape) == (dtype, p.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("u", [Gaussian(), Sphere(), Rademacher(), Coordinate(), LowRank(), Centred()])
def test_given_memory_takes_the_same_numbers(u: Gaussian, dtype: torch.dtype) -> None:
    params = [torch.zeros(3, 2, dtype=dtype), torch.zeros((), dtype=dtype)]
    out = Vector.like(params)
    for place in out:
        place.fill_(torch.nan)
    drawn = u.draw(params, 0, 0, 0).tensors(out)
    assert drawn is out
    assert all(torch.equal(a, b) for a, b in zip(drawn, u.draw(params, 0, 0, 0).tensors(), strict=True))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("u", [Gaussian(), Sphere(), Rademacher(), Coordinate(), LowRank(2), Centred(), CENTRED_SPHERE])
def test_a_stack_takes_the_numbers_of_each_direction(u: Directions, alike: bool) -> None:
    kernel = torch.zeros(4, 3, 5, 5) if alike else torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)
    weights = [torch.zeros(30, 10), kernel, torch.zeros(7), torch.zeros(()), torch.zeros(0, 3), torch.zeros(3, 0)]
    directions = [u.draw(weights, 0, 3, index, still={0: 2}) for index in range(3)]
    stack = Vector.stack(weights, 5).rows(slice(1, 4))
    assert (stack.flat is None) != alike
    hold_all(directions, stack)
    for index, direction in enumerate(directions):
        assert direction.held is not None and direction.held[0][2].count_nonzero() == 0
        alone, other = (u.draw(weights, 0, 3, index, still={0: 2}) for _ in range(2))
        for k, t in enumerate(alone.tensors()):
            assert torch.equal(t, stack[k][index]) and torch.equal(t, other[k])


def test_numbers_do_not_depend_on_the_threads_or_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    params, threads = [torch.zeros(1000), torch.zeros(700, 1001)], torch.get_num_threads()
    for u in (Gaussian(), Rademacher()):
        drawn = []
        try:
            for count, piece in ((1, 1 << 20), (3, 1 << 12)):
                torch.set_num_threads(count)
                monkeypatch.setattr(counter, "_PIECE", piece)
                drawn.append(u.draw(params, 0, 0, 0).tensors())
        finally:
            torch.set_num_threads(threads)
        assert all(map(torch.equal, *drawn))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LowRank(rank=0)


@pytest.mark.parametrize(
    "u", [Gaussian(), Sphere(), Rademacher(), Coordinate(), LowRank()], ids=lambda u: type(u).__name__
)
def test_both_parts_of_a_complex_weight_get_numbers(u: Directions) -> None:
    weights = [torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(3)]
    draws = torch.stack(
        [
            torch.cat([torch.view_as_real(a).flatten(), b])
            for a, b in (u.draw(weights, 0, step, 0).tensors() for step in range(3000))
        ]
    )
    # As in law 1: five standard deviations of a mean of products, whose fourth moment is at most 11 (Coordinate: d).
    assert torch.allclose(draws.T @ draws / 3000, torch.eye(11), rtol=0, atol=5 * (11 / 3000) ** 0.5)


@pytest.mark.parametrize("u", [Gaussian(), Sphere(), Rademacher(), LowRank()], ids=lambda u: type(u).__name__)
def test_a_row_that_stands_still_gets_no_numbers(u: Directions) -> None:
    weights = [torch.zeros(4, 3), torch.zeros(5)]
    direction = u.draw(weights, 0, 0, 0, still={0: 2})
    rows = direction.tensors()[0]
    assert not rows[2].any() and rows[[0, 1, 3]].all()
    assert direction.d == 14
    assert torch.equal(u.draw(weights, 0, 0, 0, still={0: 2})[0], rows)
    if isinstance(u, Sphere):
        norm = float(torch.cat([t.flatten() for t in direction.tensors()]).norm())
        assert norm == pytest.approx(14**0.5)


def test_a_direction_has_the_strides_of_its_weights() -> None:
    channels_last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    transposed = torch.zeros(3, 4).T
    plain = [torch.zeros(2, 3, 4, 5), torch.zeros(4, 3)]
    for u in (Gaussian(), Sphere(), Rademacher()):
        drawn = u.draw([channels_last, transposed], 0, 0, 0).tensors()
        assert [t.stride() for t in drawn] == [channels_last.stride(), transposed.stride()]
        for a, b in zip(drawn, u.draw(plain, 0, 0, 0).tensors(), strict=True):
            assert torch.equal(a, b), "the numbers do not depend on the strides"


def test_the_sphere_is_one_at_three_million_weights_too() -> None:
    u = Sphere().draw([torch.empty(1700, 1700), torch.empty(3)], 0, 0, 0).tensors()
    # Numbers are rounded by up to 6e-8 each; one running sum in float32 was off by 6e-5.
    assert sum(float(t.double().square().sum()) for t in u) / 2_890_003 == pytest.approx(1, abs=2e-7)


@pytest.mark.parametrize("weights", [[torch.zeros(3, 2), torch.zeros(5)], [torch.zeros(3, 2), torch.zeros(5).double()]])
def test_vectors_are_scaled_and_summed(weights: list[torch.Tensor]) -> None:
    """As one tensor where the weights are alike, one by one otherwise."""
    stack = Vector.stack(weights, 4)
    first, second = stack.unstack()[0], stack.rows(slice(1, 3)).unstack()[0]
    assert (first.flat is None) == (weights[1].dtype == torch.float64)
    for place, other in zip(first, second, strict=True):
        place.fill_(2.0)
        other.fill_(3.0)
    total = Vector.like(weights).copy_(first).mul_(0.5)
    total.add_(second, alpha=2.0)
    assert all(bool((t == 7).all()) and t.shape == w.shape for t, w in zip(total, weights, strict=True))
    assert all(t.shape == (4, *w.shape) and bool((t[1] == 3).all()) for t, w in zip(stack, weights, strict=True))
