"""Files of one's own Python environment as listings: with what a tool has put before each line."""

import os
import random
import sysconfig
from pathlib import Path

TOOLS = ("nothing", "blame", "log", "mail", "cat -n")
LINES = 50  # of each end of a file

Listing = tuple[str, list[bytes], list[bytes]]  # its type, first lines, last lines


def installed(types: set[str], per_type: int, seed: int) -> dict[str, list[bytes]]:
    """Files with some suffixes, none twice, in an order that the seed gives."""
    found: dict[str, dict[bytes, None]] = {suffix: {} for suffix in types}
    roots = [sysconfig.get_path(name) for name in ("stdlib", "purelib")]
    paths = sorted({Path(at, name) for root in roots for at, _, names in os.walk(root) for name in names})
    random.Random(seed).shuffle(paths)
    for path in paths:
        kept = found.get(path.suffix[1:])
        if kept is not None and len(kept) < per_type and 400 < path.stat().st_size < 100_000:
            kept[path.read_bytes()] = None
    return {suffix: list(kept) for suffix, kept in found.items()}


def listings(
    files: dict[str, list[bytes]], types: dict[str, str], part: int, seed: int, tools: tuple[str, ...] = TOOLS
) -> list[Listing]:
    """Files of some types, of part 0 or 1, each in the listing of one of the tools."""
    draw, result = random.Random(seed), []
    chosen = [(label, content) for suffix, label in types.items() for content in files[suffix][part::2]]
    for k, (label, content) in enumerate(chosen):
        tool = tools[k % len(tools)]
        lines = [prefix(tool, number, draw) + line for number, line in enumerate(content.split(b"\n"), 1)]
        result.append((label, lines[:LINES], lines[-LINES:]))
    return result


def prefix(tool: str, number: int, draw: random.Random) -> bytes:
    a, b, c, d, name = *(draw.randrange(10, 28) for _ in range(4)), draw.choice(["alice", "bob", "christine"])
    return {
        "nothing": "",
        "blame": f"{draw.getrandbits(32):08x} ({name:9} 20{a}-11-{b} {c % 24:02}:{d}:{a} +0100 {number:3}) ",
        "log": f"2024-{a % 12 + 1:02}-{b}T{c % 24:02}:{d}:{a}.{d}Z {'INFO' if a % 3 else 'WARNING'} [{name}] ",
        "mail": "> ",
        "cat -n": f"{number:6}\t",
    }[tool].encode()
