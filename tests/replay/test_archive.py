"""A run in one file, with its start's weights or with the seed that makes them."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import seed_everything
from torch.nn import functional as F

from zo_lightning import Classifier, Objective, SmallCNN, ZerothOrder
from zo_lightning.replay.archive import export
from zo_lightning.replay.command import export_command, replay_command
from zo_lightning.replay.rebuild import FOLDER, STEPS
from zo_lightning.replay.start import CannotReplay, Start
from zo_lightning.step_log import Step, StepLog
from zo_lightning.user_errors import UserError

NET = {"class_path": "zo_lightning.SmallCNN"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of five steps whose start is a seed."""
    folder = tmp_path / "run"
    seed_everything(42, verbose=False)
    estimator = ZerothOrder(seed=1)
    module = Classifier(SmallCNN(), estimator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    Start.of(module, estimator, optimizer).write(folder / FOLDER)
    log, state = StepLog(folder / FOLDER / STEPS), estimator.init(module)
    images, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
    for step in range(5):
        objective = Objective(lambda: F.cross_entropy(module(images), labels), module)
        estimate = estimator.estimate(objective, module, step, state)
        for p, gradient in estimate.gradients:
            p.grad = gradient
        optimizer.step()
        log.append(Step(step, float(estimate.loss), estimate.slopes, (0.1,)))
    log.close()
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 42, "model": {"net": NET}}))
    torch.save(module.state_dict(), folder / "end.pt")
    return folder


def end(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "end.pt", weights_only=True)


def test_where_the_start_is_a_seed_no_weights_are_written(run: Path, tmp_path: Path) -> None:
    small, large = export(run, tmp_path / "a.zorun"), export(run, tmp_path / "b.zorun", weights=True)
    assert small < 2500 and small < large / 2
    for file in ("a.zorun", "b.zorun"):
        out = tmp_path / f"{file}.ckpt"
        assert replay_command([str(tmp_path / file), "--out", str(out)]) == 0
        found = torch.load(out, weights_only=True)["state_dict"]
        assert found.keys() == end(run).keys()
        assert all(torch.equal(found[name], value) for name, value in end(run).items())


def test_another_seed_in_the_configuration_is_not_taken_for_the_start(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 43, "model": {"net": NET}}))
    export(run, tmp_path / "a.zorun")
    assert "start.safetensors" in zipfile.ZipFile(tmp_path / "a.zorun").namelist()


@pytest.mark.parametrize("net", [{"class_path": "os.Net"}, {**NET, "init_args": {"activation": "os._exit"}}])
def test_what_a_file_names_is_not_imported(run: Path, tmp_path: Path, net: dict[str, object]) -> None:
    export(run, tmp_path / "a.zorun")
    with zipfile.ZipFile(tmp_path / "a.zorun") as old, zipfile.ZipFile(tmp_path / "b.zorun", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "seed.json":
                content = json.dumps({**json.loads(content), "net": net}).encode()
            new.writestr(name, content)
    with pytest.raises(UserError, match=r"'os\..*', which would be imported: allow it with --trust"):
        replay_command([str(tmp_path / "b.zorun")])


def test_mistakes_are_one_line_and_write_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for words, message in (
        ([str(tmp_path / "none"), "--out", str(out)], "does not exist"),
        ([str(run / "config.yaml"), "--out", str(out)], "is damaged, or not a run that was exported"),
        ([str(run), "--to", "6", "--out", str(out)], "ends after step 5: there is no step 6"),
        ([str(run), "--to", "-1", "--out", str(out)], "got -1"),
        ([str(run), "--out", str(tmp_path / "out.txt")], r"must end in \.safetensors or \.ckpt"),
        ([str(run), "--out", str(tmp_path / "none" / "out.ckpt")], "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            replay_command(words)
    with pytest.raises(UserError, match="train with the callback TrajectoryLog"):
        export_command([str(tmp_path)])
    shutil.copytree(run, other := tmp_path / "other")
    (other / FOLDER / STEPS).write_bytes(b"something else")
    with pytest.raises(UserError, match="is no log of steps"):
        replay_command([str(other), "--out", str(out)])
    shutil.rmtree(other)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_damaged_file_is_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "a.zorun", weights=True)
    data = bytearray((tmp_path / "a.zorun").read_bytes())
    for place in range(40, len(data) - 40, 97):
        damaged = data.copy()
        damaged[place] ^= 0x10
        (tmp_path / "b.zorun").write_bytes(damaged)
        try:
            replay_command([str(tmp_path / "b.zorun"), "--to", "5", "--out", str(tmp_path / "b.ckpt")])
        except (UserError, CannotReplay):
            continue
        found = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]  # a flip in what is not read
        assert all(torch.equal(found[name], value) for name, value in end(run).items())


def test_a_log_that_is_torn_is_replayed_up_to_there_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = run / FOLDER / STEPS
    log.write_bytes(log.read_bytes()[:-3])
    assert replay_command([str(run)]) == 0
    said = capsys.readouterr()
    assert "The weights after 4 steps are rebuilt" in said.out
    assert "warning: the log is torn or damaged after step 4:" in said.err
    assert replay_command([str(run), "--to", "2"]) == 0
    assert "torn" not in capsys.readouterr().err


def test_a_start_whose_weights_are_damaged_is_refused_at_any_step(run: Path) -> None:
    file = run / FOLDER / "start.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    for command in (replay_command, export_command):
        words = [str(run)] if command is export_command else [str(run), "--to", "1"]
        with pytest.raises(UserError, match="is damaged: the checksum of"):
            command(words)
