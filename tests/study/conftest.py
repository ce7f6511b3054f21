"""One small study for all tests of what comes after it."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zo_lightning.__main__ import main
from zo_lightning.study.results import Results, read_results

DECLARED = """
common:
  data: {class_path: Digits}
  model: {lr_scheduler: null}
  trainer: {max_epochs: 3, limit_train_batches: 2, check_val_every_n_epoch: 1, log_every_n_steps: 2}
methods:
  FO-AdaMM:
    model: {estimator: Backprop, optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1e-3, amsgrad: true}}}
  ZO-AdaMM:
    model: {estimator: {class_path: ZerothOrder, init_args: {samples: 1}}, optimizer: AdaMM}
nets: {ScalableCNN: [0.1111111111111111, 1]}
seeds: [1, 2]
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which ``zo-lightning study -c tiny.yaml`` was run; its runs are under ``lightning_logs/tiny``."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(DECLARED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["zo-lightning"])
        assert main(["study", "-c", "tiny.yaml", "--jobs", "1"]) == 0
        yield folder


@pytest.fixture(scope="session")
def results(finished: Path) -> Results:
    return read_results(finished / "lightning_logs" / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty one, for a study that trains nothing."""
    path = tmp_path / "fake"
    path.mkdir()
    return path


def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, to do harm to."""
    return Path(shutil.copytree(finished / "lightning_logs" / "tiny", tmp_path / "tiny"))
