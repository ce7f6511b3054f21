"""A process that is killed inside a probe loses nothing: weights were never written, and a resumed run is the same."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import os, signal, sys
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from zo_lightning import AdaMM, Classifier, SmallCNN, ZerothOrder
from zo_lightning.data import Digits

folder, kill_at, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
torch.manual_seed(0)


class Net(SmallCNN):
    asked = 0

    def forward(self, x):
        Net.asked += self.training  # an attribute of the object would be put back after each probe
        if Net.asked == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


module = Classifier(Net(), ZerothOrder(samples=2, seed=0), AdaMM)
keep = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, save_last=True)
options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
trainer = Trainer(max_steps=14, max_epochs=-1, accelerator="cpu", callbacks=[keep], default_root_dir=folder, **options)
trainer.fit(module, Digits(seed=0), ckpt_path=resume)
torch.save(module.state_dict(), f"{folder}/end.pt")
"""


def run(folder: Path, kill_at: int, resume: Path | str = "") -> int:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCRIPT, str(folder), str(kill_at), str(resume)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, env=environment, timeout=120).returncode


def test_killed_inside_a_probe_and_resumed(tmp_path: Path) -> None:
    assert run(tmp_path / "whole", 0) == 0
    # Four probes a step: the 43rd is the third of the eleventh step.
    assert run(tmp_path / "killed", 43) == -signal.SIGKILL
    assert run(tmp_path / "killed", 0, tmp_path / "killed" / "last.ckpt") == 0
    whole, resumed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
