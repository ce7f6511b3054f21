"""The example of a regression by a frozen forest."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import zo_lightning as zo
from examples import recalibration
from examples.recalibration import Recalibrated, Sensor, sensor
from zo_lightning.study.declared import read_study


def test_forward_passes_move_the_map_towards_the_sensors_inverse() -> None:
    torch.manual_seed(0)
    data, net = Sensor(seed=0), Recalibrated()
    data.setup()
    (readings, targets), (matrix, shift) = data.test, sensor()

    def loss() -> torch.Tensor:
        return F.mse_loss(net(readings[:256]), targets[:256])

    optimizer = zo.NormalizedSGD(net.parameters(), lr=0.02, betas=(0.9, 0.99))
    estimator = zo.ZerothOrder(stencil=zo.CentralDifference(1 / 64), samples=8, seed=0)
    before = float(loss())
    for step in range(40):
        estimator.backward(loss, net, step)
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss()) < 0.8 * before
    with torch.no_grad():
        net.map.weight.copy_(matrix.inverse())
        net.map.bias.copy_(-matrix.inverse() @ shift)
    assert float(loss()) < 0.2 * before  # what can be reached


def test_backpropagation_has_nothing_to_follow() -> None:
    net = Recalibrated()
    with pytest.raises(RuntimeError, match="grad"):
        F.mse_loss(net(torch.rand(4, 10)), torch.rand(4, 1)).backward()


@pytest.mark.parametrize(("val_size", "held_out"), [(0.1, 500), (64, 64)])
def test_a_part_of_the_training_data_is_held_out(val_size: float, held_out: int) -> None:
    data = Sensor(batch_size=100, val_size=val_size, seed=3)
    data.setup()
    assert [len(part[0]) for part in (data.val, data.train, data.test)] == [held_out, 5000 - held_out, 2000]
    with pytest.raises(ValueError, match="val_size=-0.5 must be at least 0"):
        Sensor(val_size=-0.5).setup()
    with pytest.raises(ValueError, match="val_size=5000 must leave some"):
        Sensor(val_size=5000).setup()
    assert len({float(x[0]) for part in (data.val, data.train) for x in part[0]}) > 4990


def test_the_study_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    study = read_study(Path(__file__).parents[1] / "examples" / "benchmark_black_boxes.yaml")
    assert set(study.tasks) == {"int8", "forest"} and study.reference == "ZO-AdaMM"
    monkeypatch.setattr("sys.argv", ["recalibration"])
    recalibration.main()
    assert "with the sensor's inverse" in capsys.readouterr().out
