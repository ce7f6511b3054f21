"""What runs were trained on: only seconds of the same device can be compared."""

import contextlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

_PROCESSORS = Path("/proc/cpuinfo")  # of Linux


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        for line in _PROCESSORS.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or device.type


def device_of(about: Mapping[str, Any]) -> str:
    """What a complete run was trained on, by what it has written at its end; "unknown" where that does not say."""
    return str(about.get("device", "unknown"))


def unlike_devices(table: pd.DataFrame) -> str:
    """Why seconds of some runs are not compared: a sentence that names their devices; empty if they are of one."""
    names = sorted(set(table["device"]))
    return f"Seconds are not compared: the runs are of several devices, {', '.join(names)}." if len(names) > 1 else ""
