"""The kernels for a GPU, by Triton's interpreter on the CPU: the numbers are those of the CPU's own way."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# The interpreter is chosen when kernels are defined: in a process of their own.
COMPARED = """
import torch
from zo_lightning import counter_kernels as kernels
from zo_lightning.counter import Stream, _quantiles

for seed, step, first, stride, start in ((1, 2, 3, 1, 0), (-5, 2**40, 7, 2, 512), (2**64 - 1, 1, 2**63, 1, 2**41)):
    indices = range(first, first + 3 * stride, stride)
    streams = [Stream(seed, step, index) for index in indices]
    for dtype in (torch.float32, torch.bfloat16):
        quantiles = _quantiles(torch.device("cpu"), dtype)
        found, expected = torch.zeros(2, 3, 1300, dtype=dtype), torch.empty(2, 3, 1300, dtype=dtype)
        kernels.signs(found[0], start // 256, (seed, step), indices)
        kernels.normals(found[1], quantiles, start // 16, (seed, step), indices)
        for row, stream in enumerate(streams):
            stream.signs(expected[0, row], start)
            stream.normals(expected[1, row], start)
        assert torch.equal(found, expected), (seed, step, first, dtype)
rows = torch.zeros(2, 1400)
kernels.signs(rows[:, :700], 0, (1, 2), range(2))
assert not rows[:, 700:].any() and rows[:, :700].all(), "nothing is written beyond a row's end"
print("equal")
"""


def test_numbers_are_those_of_the_cpu() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", COMPARED], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "equal\n", ran.stderr
