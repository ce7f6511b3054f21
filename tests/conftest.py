"""What all tests share."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per worker, or the workers fight for the cores. Torch reads this when it is imported, here and in
    # subprocesses.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that torchvision's ``MNIST`` takes as its root; never downloaded by a test."""
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("MNIST is not at ../shared/data/MNIST/raw, seen from the repository")
    return root
