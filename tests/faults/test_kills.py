"""A run that is killed at random moments, and goes on each time, ends as one that was never stopped."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults import LONG
from tests.faults.runs import ASKED, Ended, assert_ended_alike, run
from zo_lightning.step_log import Step, read_steps

ESTIMATORS = {
    "ZerothOrder": "--model.estimator.samples 2",
    "PerExample": "--model.estimator PerExample",
    "Backprop": "--model.estimator Backprop",
}
KILLS = {"ZerothOrder": 17, "PerExample": 17, "Backprop": 16} if LONG else dict.fromkeys(ESTIMATORS, 2)
OWN = {"init_args": {"save_dir": ".", "name": "run", "version": ""}}
CONFIG: dict[str, Any] = {
    "trainer": {
        "max_epochs": 4,
        "check_val_every_n_epoch": 2,
        "log_every_n_steps": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [{"class_path": name, **OWN} for name in ("TensorBoardLogger", "CSVLogger")],
        "callbacks": ["tests.faults.runs.Began"],
    },
    # All that a kill can hit: written as often as a twentieth of the time allows.
    "last_checkpoint": {"every_seconds": 0.0},
}
MNIST = Path(__file__).resolve().parents[3] / "shared" / "data"


def config(folder: Path, **trainer: Any) -> Path:
    """A folder to run in, with its configuration."""
    folder.mkdir()
    settings = {**CONFIG, "trainer": {**CONFIG["trainer"], **trainer}}
    if LONG and (MNIST / "MNIST" / "raw").is_dir():
        settings |= {"data": {"class_path": "MNIST", "init_args": {"root": str(MNIST), "download": False}}}
        settings["trainer"] |= {"limit_train_batches": 100, "limit_val_batches": 10}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def killed_and_gone_on(folder: Path, words: str, draw: random.Random, seconds: float, kills: int) -> tuple[int, Ended]:
    """Run to the end, killed so many times on the way, or fewer where it is done before; how many times it was."""
    killed, go_on = 0, ""
    while True:
        after = draw.uniform(0, 1.5 * seconds / (kills + 1)) if killed < kills else None
        ended = run(folder, f"{words} {go_on}", after)
        killed += ended.code == -9
        if ended.code == 0:
            return killed, ended
        assert "Traceback" not in ended.said, ended.said
        if ended.code == 2:  # killed before the first step was done
            assert "there is no last.ckpt" in ended.said, ended.said
            shutil.rmtree(folder / "run")
            go_on = ""
        else:
            assert ended.code == -9, ended.said
            go_on = "--ckpt_path last"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_killed_at_random_moments(estimator: str, tmp_path: Path) -> None:
    words, draw, killed, trial = f"fit -c config.yaml {ESTIMATORS[estimator]}", random.Random(estimator), 0, 0
    whole = run(config(tmp_path / "whole"), words)
    assert whole.code == 0, whole.said
    while killed < KILLS[estimator]:
        trial += 1
        folder = config(tmp_path / str(trial))
        times, _ = killed_and_gone_on(folder, words, draw, whole.seconds, min(3, KILLS[estimator] - killed))
        killed += times
        assert_ended_alike(tmp_path / "whole" / "run", folder / "run")
    print(f"{estimator}: {killed} kills in {trial} runs, all as the run of {whole.seconds:.1f} s that was not stopped")


def test_what_was_logged_after_the_last_checkpoint_is_not_asked_again(tmp_path: Path) -> None:
    """With the default's interval of a minute, a short run has its checkpoint of the first step alone."""
    default = "--trainer.check_val_every_n_epoch 4 --last_checkpoint.every_seconds 60 --trainer.log_every_n_steps 10"
    words = f"fit -c config.yaml {ESTIMATORS['ZerothOrder']} {default}"
    whole, counted = config(tmp_path / "whole"), "--trainer.callbacks+ tests.faults.runs.Asked"
    time = run(whole, f"{words} {counted}")
    assert time.code == 0, time.said
    killed = config(tmp_path / "killed")
    assert run(killed, words, 0.6 * time.seconds).code == -9
    log = list(read_steps(killed / "run" / "trajectory" / "steps.log"))
    done = sum(isinstance(record, Step) for record in log)
    assert done > 10
    assert run(killed, f"{words} {counted} --ckpt_path last").code == 0
    assert_ended_alike(whole / "run", killed / "run")
    of_all, of_rest = (int((folder / ASKED).read_text()) for folder in (whole, killed))
    steps = of_all // 4  # of two directions with two passes each
    # Steps 1 to ``done`` come from the log, but for one in ten, whose metrics are logged, and the first that has the
    # smaller last batch of an epoch, whose floating-point operations nobody has counted yet.
    logged = sum((step + 1) % 10 == 0 for step in range(1, done))
    assert of_rest == 4 * (steps - done + logged + 1)
