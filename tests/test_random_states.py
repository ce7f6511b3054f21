import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from zo_lightning import random_states
from zo_lightning.random_states import NumPyState, PythonState


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    generator, state = np.random.mtrand.get_bit_generator(), np.random.get_state()
    yield
    np.random.mtrand.set_bit_generator(generator)
    np.random.set_state(state)


def seeded() -> None:
    np.random.seed(5)


def drawn() -> None:
    seeded()
    np.random.rand(700)  # beyond the 624 words of the generator's memory


def in_reserve() -> None:
    seeded()
    np.random.randn()  # of a pair, whose other number is kept


def another_kind() -> None:
    np.random.mtrand.set_bit_generator(np.random.PCG64(1))


STATES = [seeded, drawn, in_reserve, another_kind]


@pytest.mark.parametrize("begin", STATES)
@pytest.mark.parametrize("between", [lambda: None, lambda: np.random.rand(3), lambda: np.random.randn(3)])
def test_numpys_state_comes_back(begin: Callable[[], None], between: Callable[[], object]) -> None:
    begin()
    expected = np.random.randn(5)
    for _ in range(3):  # saved anew, and known from before
        begin()
        state = NumPyState.now()
        between()
        state.restore()
        assert np.array_equal(np.random.randn(5), expected)


@pytest.mark.parametrize("between", [np.random.rand, np.random.randn, seeded, in_reserve, lambda: drawn()])
def test_a_state_that_was_used_in_between_is_saved_anew(between: Callable[[], object]) -> None:
    drawn()
    NumPyState.now()
    between()
    state, expected = NumPyState.now(), np.random.randn(3)
    state.restore()
    assert np.array_equal(np.random.randn(3), expected)


def test_a_number_in_reserve_that_was_taken_is_not_given_again() -> None:
    """It is not in the generator's memory: only by that these two states differ."""
    in_reserve()
    NumPyState.now()
    np.random.randn()
    state, expected = NumPyState.now(), np.random.randn(3)
    state.restore()
    assert np.array_equal(np.random.randn(3), expected)


def test_a_state_that_is_as_it_was_is_not_saved_again() -> None:
    drawn()
    before = NumPyState.now()
    np.random.seed(0)
    before.restore()
    assert NumPyState.now() is before


def use(times: int = 1) -> list[float]:
    """A number in reserve is left behind where ``times`` is odd."""
    return [random.gauss(0.0, 1.0) for _ in range(times)] + [random.random() for _ in range(times)]


@pytest.fixture(params=[True, False], ids=["memory", "functions"])
def by_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    before = random.getstate()
    if not request.param:
        monkeypatch.setattr(random_states, "_python_memory", lambda: None)
    monkeypatch.setattr(PythonState, "_latest", None)
    yield request.param
    random.setstate(before)


@pytest.mark.parametrize("begin", [0, 1, 2, 701])
@pytest.mark.parametrize("between", [0, 1, 2, 701])
def test_pythons_state_comes_back(begin: int, between: int, by_memory: bool) -> None:
    for turn in range(3):  # saved anew, and known from before
        random.seed(5)
        use(begin)
        if turn == 2:
            use(1)
        before, state = random.getstate(), PythonState.now()
        assert (PythonState.now() is state) is by_memory
        use(between)
        random.seed(6)
        state.restore()
        assert random.getstate() == before
        expected = use(3)
        state.restore()
        assert use(3) == expected


def test_a_number_of_python_in_reserve_that_was_taken_is_not_given_again(by_memory: bool) -> None:
    """By that alone these two states differ."""
    random.seed(5)
    use(1)
    PythonState.now()
    random.gauss(0.0, 1.0)
    before, state = random.getstate(), PythonState.now()
    use(3)
    state.restore()
    assert random.getstate() == before


def test_pythons_generator_lies_in_memory_as_expected() -> None:
    """On CPython; elsewhere its functions do the work."""
    assert (random_states._python_memory() is not None) == (sys.implementation.name == "cpython")
