"""Files of a run, a study and its replay, cut short or with a bit flipped: never other weights without a word.

What is read again must be found whole (``same``), be refused in one or two lines (``error``), or be left out for
something whole with a warning (``warned``). Text that people edit (configurations, tables) has no checksum: where a
damaged one still reads, it says what it says (``other text``), which is counted apart.
"""

import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.callbacks.test_last_checkpoint import same
from tests.faults import LONG
from tests.test_cli import cli
from zo_lightning.checkpoint_io import load_checked
from zo_lightning.snapshots import read_snapshots
from zo_lightning.study.results import read_results
from zo_lightning.user_errors import UserError

RUN = Path("lightning_logs", "version_0")
QUIET = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
SHORT = f"--trainer.limit_train_batches 3 --trainer.limit_val_batches 1 {QUIET} --model.net ScalableCNN"
TEXT = ("config.yaml", "metrics.csv", "study.yaml", "finished.yaml")
Read = Callable[[Path, pytest.CaptureFixture[str]], object]
"""Reads a damaged file as its users do and gives what came out, or an error's text; the folder is a copy."""


class Refused(Exception):
    """What a user was told."""


def told(capsys: pytest.CaptureFixture[str], words: str) -> str:
    """Run a command line; what it printed and warned of."""
    code = cli(words)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err, printed.err
    if code != 0:
        lines = [line for line in printed.err.splitlines() if line.startswith("zo-lightning: error")]
        assert code in (1, 2) and len(lines) == 1 and len(lines[0]) < 1000, printed.err
        raise Refused(lines[0])
    return printed.out + printed.err


def gone_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    said = told(capsys, f"fit {SHORT} --trainer.max_epochs 4 --ckpt_path last")
    return load_checked(folder / RUN / "checkpoints" / "last.ckpt")["state_dict"], said


def evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    said = told(capsys, f"test {QUIET} --model.net ScalableCNN --ckpt_path best")
    return [line for line in said.splitlines() if "test/" in line], said


def configured(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    return told(capsys, f"fit -c {RUN / 'config.yaml'} --print_config"), ""


def replayed(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    said = told(capsys, f"replay {RUN} --out end.ckpt")
    return torch.load("end.ckpt", weights_only=True)["state_dict"], said


def replayed_in_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    said = told(capsys, f"replay {RUN} --to 2 --out end.ckpt")
    return torch.load("end.ckpt", weights_only=True)["state_dict"], said


def replayed_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    said = told(capsys, "replay run.zorun --out end.ckpt")
    return torch.load("end.ckpt", weights_only=True)["state_dict"], said


def looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    try:
        return [shot.load() for shot in read_snapshots(RUN)], ""
    except ValueError as error:
        raise Refused(str(error)) from error


def results(folder: Path, capsys: pytest.CaptureFixture[str]) -> object:
    try:
        found = read_results(Path("lightning_logs", "tiny"))
    except UserError as error:
        raise Refused(str(error)) from error
    return found.table.to_csv(), f"{found.missing}" if found.missing else ""


# Each kind of file with what reads it, and how many are damaged in the short and in the long form.
FILES: dict[str, tuple[str, Read, int, int]] = {
    "last.ckpt": (f"{RUN}/checkpoints/last.ckpt", gone_on, 3, 20),
    "best.ckpt": (f"{RUN}/checkpoints/best.ckpt", evaluated, 1, 15),
    "config.yaml": (f"{RUN}/config.yaml", configured, 2, 20),
    "steps.log": (f"{RUN}/trajectory/steps.log", replayed, 4, 25),
    "steps.log, going on": (f"{RUN}/trajectory/steps.log", gone_on, 1, 10),
    "start.json": (f"{RUN}/trajectory/start.json", replayed_in_part, 4, 20),
    "start.safetensors": (f"{RUN}/trajectory/start.safetensors", replayed_in_part, 4, 20),
    "run.zorun": ("run.zorun", replayed_file, 4, 20),
    "snapshot": (f"{RUN}/snapshots/epoch=00001-step=000000003.safetensors", looked_at, 4, 20),
    "metrics.csv, going on": (f"{RUN}/metrics.csv", gone_on, 1, 8),
    "metrics.csv of a study": ("lightning_logs/tiny/FO/SmallCNN/seed_1/metrics.csv", results, 2, 10),
    "finished.yaml": ("lightning_logs/tiny/FO/SmallCNN/seed_1/finished.yaml", results, 2, 6),
    "study.yaml": ("lightning_logs/tiny/study.yaml", results, 2, 6),
}
STUDY = """
common:
  data: {class_path: Digits}
  trainer: {max_epochs: 1, limit_train_batches: 2, check_val_every_n_epoch: 1, log_every_n_steps: 2}
methods: {FO: {model: {estimator: Backprop, lr_scheduler: null}}}
nets: {SmallCNN: null}
seeds: [1]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two epochs with all that it can write, its export, and a study of one cell."""
    folder = tmp_path_factory.mktemp("made")
    loggers = "--trainer.logger TensorBoardLogger --trainer.logger.save_dir . --trainer.logger+ CSVLogger"
    loggers += " --trainer.logger.save_dir ."
    callbacks = "--trainer.callbacks+ WeightSnapshots --trainer.callbacks.histograms false"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["zo-lightning"])
        words = f"fit {SHORT} {loggers} {callbacks} --trainer.check_val_every_n_epoch 1 --trainer.log_every_n_steps 1"
        assert cli(f"{words} --trainer.max_epochs 2") == 0
        assert cli(f"export {RUN} --out run.zorun --weights") == 0
        (folder / "tiny.yaml").write_text(STUDY)
        assert cli("study -c tiny.yaml --jobs 1") == 0
        yield folder


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file that is cut short, or has one bit flipped, or 16 bytes zeroed."""
    place = draw.randrange(len(content))
    how = draw.choice(["cut", "flip", "flip", "zeros"])
    if how == "cut":
        return content[:place]
    if how == "zeros":
        return content[:place] + bytes(min(16, len(content) - place)) + content[place + 16 :]
    flipped = bytearray(content)
    flipped[place] ^= 1 << draw.randrange(8)
    return bytes(flipped)


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(
    kind: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])
    name, read, short, long = FILES[kind]
    draw = random.Random(kind)
    content = (made / name).read_bytes()

    def outcome(of: Path, data: bytes) -> object:
        shutil.copytree(made, of)
        (of / name).write_bytes(data)
        monkeypatch.chdir(of)
        found = read(of, capsys)
        monkeypatch.chdir(made)
        shutil.rmtree(of)
        return found

    whole, _ = outcome(tmp_path / "whole", content)  # type: ignore[misc]
    counted: Counter[str] = Counter()
    reasons: set[str] = set()
    for trial in range(long if LONG else short):
        data = damaged(content, draw)
        if data == content:
            counted["same"] += 1
            continue
        try:
            found, said = outcome(tmp_path / str(trial), data)  # type: ignore[misc]
        except Refused as refused:
            counted["error"] += 1
            reasons.add(str(refused))
            monkeypatch.chdir(made)
            continue
        if any(word in said for word in ("zo-lightning: warning:", "damaged (", "not finished")):
            counted["warned"] += 1
        elif same(found, whole):
            counted["same"] += 1
        else:
            counted["other text"] += 1
            assert name.endswith(TEXT), f"{kind}, trial {trial}: another result, and nothing was said"
    with capsys.disabled():
        if LONG:
            print(
                f"\n| {kind} | " + " | ".join(str(counted[one]) for one in ("error", "warned", "same", "other text")),
                "|",
            )


def test_tensors_of_a_file_are_compared_with_their_checksums(tmp_path: Path) -> None:
    from zo_lightning.snapshots import write_snapshot

    weights: dict[str, Tensor] = {"w": torch.randn(4, 3), "n": torch.arange(3)}
    shot = write_snapshot(tmp_path, weights, 1, 1)
    assert same(shot.load(), weights)
    content = bytearray(shot.path.read_bytes())
    content[-1] ^= 1
    shot.path.write_bytes(content)
    with pytest.raises(ValueError, match="the checksum of '.' in it is wrong"):
        shot.load()
