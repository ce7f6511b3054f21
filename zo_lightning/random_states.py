"""The states of the global random number generators: to be put back after a pass, or to be held by a checkpoint."""

import ctypes
import random
import struct
import sys
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

_SIZE = 624 * 4 + 4  # bytes of a Mersenne twister: its key, and the place in it


def random_states() -> dict[str, Any]:
    """The states of PyTorch's generators (CPU and, where it is in use, CUDA), of NumPy's and of Python's."""
    kind, words, *rest = np.random.get_state()  # type: ignore[misc]
    states = {
        "torch": torch.get_rng_state(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set the generators to what ``random_states`` gave; CUDA's as far as there are as many devices."""
    torch.set_rng_state(states["torch"].cpu())
    kind, words, *rest = states["numpy"]
    np.random.set_state((kind, words.cpu().numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available() and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


class NumPyState:
    """The state of NumPy's global generator, to be put back later.

    NumPy's own functions take 60 µs for both, in every training step. Here the generator's memory is compared with that
    of the state saved last, and copied back: 4 µs as long as nobody has used it in between. A normal number that the
    generator holds in reserve is not in that memory; while there is one, NumPy's functions do the work.
    """

    _latest: ClassVar["NumPyState | None"] = None

    def __init__(self) -> None:
        memory = _memory()
        self._words = None if memory is None else memory.raw
        self._state: Any = np.random.get_state(legacy=False)

    @classmethod
    def now(cls) -> "NumPyState":
        """The present state; the object saved last, where that is it."""
        latest, memory = cls._latest, _memory()
        if latest is None or not latest._is_all_in(memory) or latest._words != memory.raw:  # type: ignore[union-attr]
            latest = cls._latest = cls()
        return latest

    def restore(self) -> None:
        """Put it back."""
        memory = _memory()
        if self._is_all_in(memory):
            np.random.seed(0)  # forgets a number in reserve
            memory.raw = self._words  # type: ignore[union-attr]
        else:
            np.random.set_state(self._state)

    def _is_all_in(self, memory: Any) -> bool:
        """Whether the words in a generator's memory are all there is to the state."""
        return memory is not None and self._words is not None and not self._state["has_gauss"]


class PythonState:
    """The state of Python's global generator, to be put back later, by its memory as that of NumPy's is.

    Python's own functions make an object of each of its 625 numbers, in memory that a forward pass has emptied of them.
    """

    _latest: ClassVar["PythonState | None"] = None

    def __init__(self) -> None:
        memory = _python_memory()
        self._words = None if memory is None else memory.raw
        self._state = random.getstate()

    @classmethod
    def now(cls) -> "PythonState":
        """The present state; the object saved last, where that is it."""
        latest, memory = cls._latest, _python_memory()
        if latest is None or memory is None or latest._words != memory.raw or latest._state[2] != _PYTHON.gauss_next:
            latest = cls._latest = cls()
        return latest

    def restore(self) -> None:
        """Put it back."""
        memory = _python_memory()
        if memory is None or self._words is None:
            random.setstate(self._state)
        else:
            memory.raw, _PYTHON.gauss_next = self._words, self._state[2]


_PYTHON: Any = random.getstate.__self__  # type: ignore[attr-defined]
"""Python's global generator."""


@lru_cache
def _python_memory() -> Any:
    """The memory of Python's global generator, or None where it does not lie as CPython lays it: place, then key."""
    _, (*key, place), _ = random.getstate()
    laid = struct.pack(f"=i{len(key)}I", place, *key)
    room = type(_PYTHON).__basicsize__ if sys.implementation.name == "cpython" else 0
    begin = ctypes.string_at(id(_PYTHON), room).find(laid)
    return None if begin < 0 else (ctypes.c_char * len(laid)).from_address(id(_PYTHON) + begin)


def _memory() -> Any:
    """The memory of NumPy's global generator, or None where it is no Mersenne twister."""
    generator = np.random.mtrand.get_bit_generator()
    if type(generator) is not np.random.MT19937:
        return None
    return (ctypes.c_char * _SIZE).from_address(generator.ctypes.state_address)


class GlobalState:
    """The state of all global generators, to be put back later: NumPy's, Python's, and the given ones of PyTorch."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        self._torch = [(generator, generator.get_state()) for generator in generators]
        self._python, self._numpy = PythonState.now(), NumPyState.now()

    def restore(self) -> None:
        """Put it back."""
        for generator, state in self._torch:
            generator.set_state(state)
        self._python.restore()
        self._numpy.restore()


def seed_all(generators: list[torch.Generator], seed: int) -> None:
    """Seed NumPy's global generator, Python's, and the given ones of PyTorch."""
    for generator in generators:
        generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
