"""The IDX format of MNIST's files, checked before they are read, so that a damaged one is named."""

import math
import struct
from pathlib import Path

UNSIGNED_BYTE = 0x08


def check_idx_file(path: Path, ndim: int) -> tuple[int, ...]:
    """Check that ``path`` is a complete IDX file of unsigned bytes with ``ndim`` dimensions; return its shape.

    The format is: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    32-bit number, the values. Raises ``ValueError`` otherwise. Source: http://yann.lecun.com/exdb/mnist.
    """
    magic = bytes([0, 0, UNSIGNED_BYTE, ndim])
    header_size = 4 + 4 * ndim
    with path.open("rb") as file:
        header = file.read(header_size)
    if header[:4] != magic:
        start = header[:4].hex()
        raise ValueError(f"'{path}' is not the IDX file expected: it starts with {start}, not {magic.hex()}; delete it")
    if len(header) < header_size:
        raise ValueError(f"'{path}' is truncated: {len(header)} bytes do not hold its header; delete it")
    shape = struct.unpack(f">{ndim}I", header[4:])
    expected, actual = header_size + math.prod(shape), path.stat().st_size
    if actual != expected:
        problem = "truncated" if actual < expected else "too long"
        sizes = "x".join(map(str, shape))
        raise ValueError(
            f"'{path}' is {problem}: {actual:,} bytes, but its header ({sizes}) asks for {expected:,}; delete it"
        )
    return shape
