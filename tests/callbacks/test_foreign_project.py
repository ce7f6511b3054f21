"""Somebody else's project, in a folder of its own, uses every callback unchanged."""

import os
import subprocess
import sys
from pathlib import Path

from tests.callbacks.runs import events

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from zo_lightning import callbacks as observe


class LitResNet(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = resnet18(num_classes=10)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


torch.manual_seed(0)
data = TensorDataset(torch.rand(8, 3, 32, 32), torch.randint(10, (8,)))
observers = [
    observe.WeightSnapshots(keep=1),
    observe.WeightSimilarity("logs/first/version_0"),
    observe.GradientAlignment(every_n_steps=1),
    observe.FilterImages(),
    observe.FilterProjection("logs/first/version_0"),
    observe.Budget(),
    observe.Dashboard(),
]
for name, callbacks in (("first", [observe.WeightSnapshots(histograms=False)]), ("second", observers)):
    trainer = Trainer(
        max_epochs=2 if name == "second" else 1,
        accelerator="cpu",
        logger=TensorBoardLogger("logs", name),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(LitResNet(), DataLoader(data, batch_size=4))
"""


def test_resnet18_in_automatic_optimization(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "logs" / "second" / "version_0"
    seen = events(folder)
    tags = seen.Tags()
    layers = {
        tag.removeprefix("vs_reference/matched/") for tag in tags["scalars"] if tag.startswith("vs_reference/matched")
    }
    assert len(layers) == 20 and "model.conv1.weight" in layers  # the convolutions of a ResNet-18
    assert [event.value for event in seen.Scalars("vs_true_gradient/cosine/all")] == [1.0] * 4
    spent = [event.value for event in seen.Scalars("budget/flops")]
    assert [event.step for event in seen.Scalars("vs_flops/train_loss")] == [round(value / 1e6) for value in spent]
    assert {"vs_start/l2/all", "vs_reference/cosine/all", "weight_norm/all", "budget/examples"} <= set(tags["scalars"])
    assert "weights/model.layer4.1.conv2.weight" in tags["histograms"]
    pictures = {tag.partition("/")[0] for tag in tags["images"]}
    assert pictures == {"filters", "filter_projection"}
    (first, *_) = seen.Images("filters/model.conv1.weight")
    assert first.width == first.height > 100  # 32 of 64 RGB filters, in a grid
    assert "custom_scalars__config__" in tags["tensors"]
    assert "_hparams_/session_start_info" in seen.summary_metadata
    assert len(list((folder / "snapshots").glob("*.safetensors"))) == 2
    assert (folder / "projector_config.pbtxt").is_file()
