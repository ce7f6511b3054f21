"""Freed memory stays with the process, unless the environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

# Three tensors of 20 MB live at a time: more than glibc keeps by itself, twice the largest that was freed.
_PROGRAM = """
import resource
import torch
from zo_lightning.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(5 * 2**20) for _ in range(3)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
faults()
print(kept, faults())
"""


def pages(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the pages that ten rounds have asked the system for."""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", _PROGRAM]
    run = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_tensors_serve_the_next_ones() -> None:
    kept, faults = pages()
    assert kept
    assert faults < 1000
    _, given_back = pages(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert given_back > 100_000  # of 150,000, 10 · 3 · 20 MB by 4 KB; glibc's own way lies anywhere between


def test_the_environment_has_the_last_word() -> None:
    assert not pages(MALLOC_TRIM_THRESHOLD_="131072")[0]
    assert not pages(GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0]
