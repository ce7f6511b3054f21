"""What a run prints of its progress, in a terminal and elsewhere."""

import io
import re
import sys
from typing import Any

import pytest
from pytorch_lightning import LightningModule, Trainer

from tests.callbacks.runs import batches, classifier, validation
from zo_lightning.callbacks.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Talkative(ProgressBar):
    """Says something in the middle, as a user's module may by ``self.print``."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            pl_module.print("a user's words")


def printed(monkeypatch: pytest.MonkeyPatch, output: io.StringIO, bar: ProgressBar, epochs: int = 3) -> list[str]:
    monkeypatch.setattr(sys, "stdout", output)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        check_val_every_n_epoch=1,
    )
    trainer.fit(classifier(), batches(), validation())
    return re.split(r"[\r\n]+", output.getvalue().strip())


def test_a_file_gets_a_line_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, io.StringIO(), ProgressBar(every_seconds=0.0))
    number = r"\d[\d.e+-]*"
    shape = rf"epoch \d/3: train/loss {number}, val/loss {number}, val/acc {number}, \d+ s"
    assert [line[:9] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all(re.fullmatch(shape, line) for line in lines), lines


def test_short_epochs_share_a_line_and_the_last_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, io.StringIO(), ProgressBar(every_seconds=1e9))
    assert [line[:9] for line in lines] == ["epoch 1/3", "epoch 3/3"]


def test_words_of_a_module_are_printed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, io.StringIO(), Talkative(), epochs=1)[0] == "a user's words"


def test_a_terminal_gets_the_bar_without_a_number_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, Terminal(), ProgressBar())
    assert any(re.match(r"Epoch 2: 100%", line) for line in lines)
    assert not [line for line in lines if line.startswith("epoch")]


def test_a_rate_of_0_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, io.StringIO(), ProgressBar(refresh_rate=0)) == [""]
