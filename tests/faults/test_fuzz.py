"""Configurations with random mistakes: each runs, or is refused in one line and writes nothing."""

import copy
import random
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from tests.faults import LONG
from tests.test_cli import cli
from zo_lightning.cli_parser import DEFAULT

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [DEFAULT, *sorted(ROOT.glob("configs/*.yaml")), *sorted(ROOT.glob("configs/[!s]*/*.yaml"))]
TRIALS, PRINTED = (2000, 10) if LONG else (60, 3)
"""Configurations, and which of them run, if only for no epoch: the others are parsed and printed."""
SECONDS = 60
"""That one command line may take: what takes longer hangs."""
# What would need other machines, or a long time.
LIMITS = "--trainer.max_epochs 0 --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1"
LIMITS += " --trainer.strategy auto --trainer.enable_progress_bar false --trainer.enable_model_summary false"
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**30, -(10**12), 0.5, -2.5, 1e300, 1e-300, float("nan"), float("inf"), "", "text",
    "1e-3", "null", "../x", "é\u2028", "x" * 3000, "a.b.C", "torch.nn.Linear", "torch.optim.SGD", "zo_lightning.Sphere",
    "Backprop", "PerExample", "AdaMM", [], {}, [1, 2], ["a", None], [[]], {"a": 1}, {"class_path": "Sphere"},
    {"class_path": 3}, {"init_args": {}}, {"class_path": "AdaMM", "init_args": {"lr": "x"}}, {1: 2}, {None: None},
    {"class_path": "zo_lightning.ZerothOrder", "init_args": [1]}, [{"class_path": "EarlyStopping"}],
]  # fmt: skip
KEYS = [
    "class_path",
    "init_args",
    "lr",
    "mu",
    "samples",
    "net",
    "estimator",
    "callbacks",
    "",
    "a.b",
    "0",
    "seed",
    "root",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def typo(word: str, draw: random.Random) -> str:
    place = draw.randrange(len(word) + 1)
    return draw.choice(
        [word[:place] + word[place + 1 :], word[:place] + draw.choice("aexz_.1") + word[place:], word.upper()]
    )


def mutated(config: dict[Any, Any], draw: random.Random) -> None:
    """Change one thing."""
    path = draw.choice(list(places(config)) or [("model",)])
    holder: Any = config
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    kind = draw.choice(["value", "value", "value", "key", "add", "delete", "word", "shift"])
    if kind == "value":
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == "key" and isinstance(holder, dict) and key in holder:
        holder[typo(str(key), draw)] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
    elif kind == "delete" and key in (holder if isinstance(holder, dict) else range(len(holder))):
        del holder[key]
    elif kind == "word" and isinstance(holder, dict) and isinstance(holder.get(key), str):
        holder[key] = typo(holder[key], draw)
    elif kind == "shift" and isinstance(holder, dict) and key in holder:
        config[key] = holder.pop(key)


def mutated_text(text: str, draw: random.Random) -> str:
    """Change some letters, or the indentation of a line."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 2)):
        at = draw.randrange(len(lines))
        place = draw.randrange(len(lines[at]) + 1)
        letter = draw.choice(
            [" ", ":", "-", "[", "}", "&a ", "*a", "!!python/name:os.system ", "#", "'", "\t", "\x00", "%"]
        )
        lines[at] = lines[at][:place] + letter + lines[at][place:]
    return "\n".join(lines)


def configuration(trial: int) -> str:
    """The text of a configuration with one to three mistakes, by number."""
    draw = random.Random(f"configuration {trial}")
    config = yaml.safe_load(draw.choice(SOURCES).read_text(encoding="utf-8"))
    if draw.random() < 0.8 and "data" in config:
        config["data"] = {"class_path": "zo_lightning.data.Digits"}  # others would have to be downloaded
    if draw.random() < 0.15:
        return mutated_text(yaml.safe_dump(config, sort_keys=False), draw)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        mutated(config, draw)
    return yaml.safe_dump(config, sort_keys=False)


def late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def refused(*_: Any, **__: Any) -> Any:
    raise OSError("no network in this test")


@pytest.mark.filterwarnings("ignore")
def test_configurations_with_mistakes_run_or_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    before = signal.signal(signal.SIGALRM, late)
    counted: Counter[str] = Counter()
    failures: dict[str, str] = {}
    for trial in range(TRIALS):
        folder = tmp_path / str(trial)
        folder.mkdir()
        monkeypatch.chdir(folder)
        (tmp_path / "c.yaml").write_text(configuration(trial), encoding="utf-8")
        signal.alarm(SECONDS)
        try:
            code = cli(f"fit -c ../c.yaml {LIMITS}" + (" --print_config" if trial % PRINTED else ""))
        except BaseException as error:  # what a user would see as a traceback
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = (
                ""
                if frame is None
                else f"{frame.tb_frame.f_code.co_filename.rpartition('site-packages/')[2]}:{frame.tb_lineno}"
            )
            failures.setdefault(f"{type(error).__name__} {where}", f"{trial}: {str(error)[:300]}")
            counted["traceback"] += 1
            continue
        finally:
            signal.alarm(0)
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("zo-lightning: error: ")]
        counted[f"exit {code}"] += 1
        if code == 2:
            if len(lines) != 1 or len(lines[0]) > 1500 or "Traceback" in error or "usage:" in error:
                failures.setdefault(f"not one line: {error[-200:]}", str(trial))
            if any(folder.rglob("*")):
                failures.setdefault(f"written: {[str(p) for p in folder.rglob('*')][:3]}", f"{trial}: {lines}")
        elif code != 0:
            failures.setdefault(f"exit {code}: {lines}", str(trial))
        shutil.rmtree(folder)
    signal.signal(signal.SIGALRM, before)
    if LONG:
        with capsys.disabled():
            print(f"\n{TRIALS} configurations: {dict(counted)}")
    assert not failures, "\n".join(f"{what} <- trial {where}" for what, where in failures.items())
