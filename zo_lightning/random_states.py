"""The states of all global random number generators, in a form that a checkpoint can hold without pickled objects."""

import random
from typing import Any

import numpy as np
import torch


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
