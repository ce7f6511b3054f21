"""Other people's modules and Lightning's features under an estimator: what docs/compatibility.md says of each, run.

Every row is trained by the mixin and by the callback. A row that works has the same weights by both, finite and moved,
after as many steps as automatic optimization takes; one that is refused raises what the page says before it is trained.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.demos.boring_classes import BoringModel, ManualOptimBoringModel
from pytorch_lightning.demos.transformer import LightningTransformer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import zo_lightning as zo

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
EXAMPLES, BATCH = 24, 4


def loader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=BATCH)


def vectors(size: int = 8, classes: int = 3) -> DataLoader[Any]:
    x = torch.randn(EXAMPLES, size, generator=torch.Generator().manual_seed(0))
    return loader(x, x[:, :classes].argmax(1))


def words(length: int = 5, vocabulary: int = 11) -> DataLoader[Any]:
    x = torch.randint(1, vocabulary, (EXAMPLES, length), generator=torch.Generator().manual_seed(0))
    return loader(x, x[:, 0] % 3)


class Lit(LightningModule):
    """A classifier as anyone would write it, of any net."""

    data: Any = staticmethod(vectors)
    net: Any

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)) if net is None else net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return type(self).data()

    def val_dataloader(self) -> DataLoader[Any]:
        return type(self).data()


def lit(net: Callable[[], nn.Module], data: Callable[[], DataLoader[Any]] = vectors, seed: int = 0) -> type[Lit]:
    """A class of modules of one net."""

    class OfNet(Lit):
        def __init__(self) -> None:
            torch.manual_seed(seed)
            super().__init__(net())

    OfNet.data = staticmethod(data)
    return OfNet


def optimizer(configure: Callable[[Lit], Any]) -> type[Lit]:
    """A class of modules with other optimizers."""

    class Configured(Lit):
        def configure_optimizers(self) -> Any:
            return configure(self)

    return Configured


@dataclass(frozen=True)
class Case:
    """A row of the page.

    Attributes:
        module: the class that is trained.
        trainer: settings of the trainer.
        refusal: what the error says, or None where it works.
        estimator: what trains.
        warns: what is said beside.
    """

    module: Callable[[], type[LightningModule]] = lambda: Lit
    trainer: Callable[[], dict[str, Any]] = dict
    refusal: str | None = None
    estimator: zo.GradientEstimator = field(default_factory=lambda: zo.ZerothOrder(seed=0))
    warns: str | None = None


def trainer(**settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: settings


def with_callback(make: Callable[[], Any], **settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"callbacks": [make()], **settings}


class Plateau(Lit):
    def configure_optimizers(self) -> Any:
        made = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(made, patience=0)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class WarmUp(Lit):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (self.trainer.global_step + 1) / 5) * 0.1


class NoneStep(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class PopsItsBatch(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch.pop(0)
        x.mul_(2)
        return F.cross_entropy(self.net(x), batch[0])


class Gan(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in (self.net[0].weight, self.net[3].weight)], []


class TwoOptimizers(Lit):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in (self.net[0].weight, self.net[3].weight)]


class TakesIterator(Lit):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:  # type: ignore[override]
        return super().training_step(*next(dataloader_iter)[:2])


class Physics(Lit):
    """The loss takes a gradient with respect to the inputs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.enable_grad():
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope.square().mean()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 3, padding_idx=0), nn.Linear(3, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))[:, :3]


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 3)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(11, 4), kind(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0][:, -1])


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.w).abs()


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


class Language(LightningTransformer):
    """Lightning's own demo, with a small vocabulary and data that need no download."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(vocab_size=11)

    def prepare_data(self) -> None:
        pass

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randint(11, (EXAMPLES, 5), generator=torch.Generator().manual_seed(0))
        return loader(x, x.roll(-1, 1))


def resnet(seed: int = 0) -> type[Lit]:
    from torchvision.models import resnet18

    images = torch.randn(EXAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return lit(lambda: resnet18(num_classes=3), lambda: loader(images, torch.arange(EXAMPLES) % 3), seed)


def bert() -> type[Lit]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )

    class Bert(Lit):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(transformers.BertForSequenceClassification(config))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(input_ids=batch[0], labels=batch[1]).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.net(input_ids=batch[0], labels=batch[1]).loss)

    Bert.data = staticmethod(words)
    return Bert


def timm_net() -> type[Lit]:
    timm = pytest.importorskip("timm")
    images = torch.randn(EXAMPLES, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return lit(
        lambda: timm.create_model("test_resnet", num_classes=3), lambda: loader(images, torch.arange(EXAMPLES) % 3)
    )


def normed(norm: Callable[[nn.Module], nn.Module]) -> type[Lit]:
    return lit(lambda: nn.Sequential(norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)))


class Unfreeze(lightning.BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])  # type: ignore[index]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)  # type: ignore[index]


TRAINER: dict[str, Case] = {
    "`max_steps`": Case(trainer=trainer(max_epochs=-1, max_steps=7)),
    "`accumulate_grad_batches`": Case(trainer=trainer(accumulate_grad_batches=4)),
    "`gradient_clip_val`": Case(trainer=trainer(gradient_clip_val=0.1)),
    "`gradient_clip_algorithm: value`": Case(trainer=trainer(gradient_clip_val=0.1, gradient_clip_algorithm="value")),
    "`precision: bf16-mixed`": Case(trainer=trainer(precision="bf16-mixed")),
    "`precision: bf16-true`": Case(
        module=lambda: Lit,
        trainer=trainer(precision="bf16-true"),
        estimator=zo.ZerothOrder(zo.Sphere(), zo.CentralDifference(0.1), seed=0),
    ),
    "`precision: 64-true`": Case(trainer=trainer(precision="64-true")),
    "`fast_dev_run`": Case(trainer=trainer(fast_dev_run=3)),
    "`barebones`": Case(trainer=trainer(barebones=True)),
    "`log_every_n_steps: 0`": Case(trainer=trainer(log_every_n_steps=0)),
    "`overfit_batches`": Case(trainer=trainer(overfit_batches=2)),
    "`val_check_interval`": Case(trainer=trainer(val_check_interval=2)),
    "`check_val_every_n_epoch`": Case(trainer=trainer(check_val_every_n_epoch=2)),
    "`detect_anomaly`": Case(trainer=trainer(detect_anomaly=True)),
    "`profiler: simple`": Case(trainer=trainer(profiler="simple")),
    "`inference_mode: false`": Case(trainer=trainer(inference_mode=False)),
    "`reload_dataloaders_every_n_epochs`": Case(trainer=trainer(reload_dataloaders_every_n_epochs=1)),
}
CALLBACKS: dict[str, Case] = {
    "`ModelCheckpoint`": Case(
        trainer=with_callback(lambda: lightning.ModelCheckpoint(monitor="val_loss"), enable_checkpointing=True)
    ),
    "`EarlyStopping`": Case(
        trainer=with_callback(lambda: lightning.EarlyStopping("val_loss", stopping_threshold=100.0))
    ),
    "`LearningRateMonitor`": Case(trainer=with_callback(lightning.LearningRateMonitor, logger=True)),
    "`GradientAccumulationScheduler`": Case(
        trainer=with_callback(lambda: lightning.GradientAccumulationScheduler({0: 2, 1: 3}))
    ),
    "`StochasticWeightAveraging`": Case(
        trainer=with_callback(lambda: lightning.StochasticWeightAveraging(0.1, swa_epoch_start=1))
    ),
    "`EMAWeightAveraging`": Case(trainer=with_callback(lambda: lightning.EMAWeightAveraging(decay=0.5))),
    "`ModelPruning`": Case(trainer=with_callback(lambda: lightning.ModelPruning("l1_unstructured", amount=0.3))),
    "`BaseFinetuning`": Case(trainer=with_callback(Unfreeze)),
    "`LearningRateFinder`": Case(
        module=lambda: type("WithRate", (Lit,), {"lr": 0.1}),
        trainer=with_callback(lambda: lightning.LearningRateFinder(num_training_steps=10, attr_name="lr")),
    ),
    "`Timer`": Case(trainer=with_callback(lambda: lightning.Timer(duration={"hours": 1}))),
    "`TQDMProgressBar`": Case(trainer=with_callback(lightning.TQDMProgressBar, enable_progress_bar=True)),
}
OPTIMIZERS: dict[str, Case] = {
    "an optimizer": Case(),
    "a list of one": Case(lambda: optimizer(lambda m: [torch.optim.Adam(m.parameters())])),
    "two lists, with a scheduler": Case(
        lambda: optimizer(
            lambda m: (
                [made := torch.optim.SGD(m.parameters(), lr=0.1)],
                [torch.optim.lr_scheduler.StepLR(made, 1)],
            )
        )
    ),
    "a dictionary with a plateau scheduler": Case(lambda: Plateau),
    "parameter groups": Case(
        lambda: optimizer(
            lambda m: torch.optim.SGD(
                [{"params": m.net[0].parameters(), "lr": 1.0}, {"params": m.net[3].parameters()}], lr=0.1
            )
        )
    ),
    "`LBFGS`": Case(lambda: optimizer(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.01, max_iter=2))),
    "a warm-up in `optimizer_step`": Case(lambda: WarmUp),
    "none": Case(lambda: optimizer(lambda m: None), refusal="no optimizer"),
    "several": Case(lambda: TwoOptimizers, refusal="an estimator trains by one optimizer"),
    "manual optimization (a GAN)": Case(lambda: Gan, refusal="steps its optimizers itself"),
}
MODULES: dict[str, Case] = {
    "Lightning's `BoringModel`": Case(lambda: BoringModel, trainer=trainer(limit_train_batches=6, limit_val_batches=1)),
    "Lightning's `ManualOptimBoringModel`": Case(lambda: ManualOptimBoringModel, refusal="steps its optimizers itself"),
    "Lightning's `LightningTransformer`": Case(lambda: Language, trainer=trainer(max_epochs=1)),
    "torchvision's ResNet-18": Case(resnet, trainer=trainer(max_epochs=1, limit_val_batches=0)),
    "transformers' BERT": Case(bert),
    "a net of timm": Case(timm_net, trainer=trainer(max_epochs=1, limit_val_batches=0)),
    "LSTM": Case(lambda: lit(lambda: Recurrent(nn.LSTM), words)),
    "GRU": Case(lambda: lit(lambda: Recurrent(nn.GRU), words)),
    "tied weights, a padding row": Case(lambda: lit(Tied, words)),
    "a layer under two names": Case(lambda: lit(TwoNames)),
    "weight norm": Case(lambda: normed(parametrizations.weight_norm)),
    "spectral norm": Case(lambda: normed(parametrizations.spectral_norm)),
    "lazily initialised layers": Case(
        lambda: lit(lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3))), refusal=None
    ),
    "complex weights": Case(lambda: lit(Complex)),
    "sparse embeddings": Case(lambda: lit(Sparse, words)),
    "TorchScript": Case(
        lambda: lit(lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))))
    ),
    "`training_step` returns None": Case(lambda: NoneStep),
    "`training_step` changes its batch": Case(lambda: PopsItsBatch),
    "a gradient with respect to inputs": Case(lambda: Physics),
    "`dataloader_iter`": Case(lambda: TakesIterator, refusal="takes a dataloader_iter"),
}
TABLES = {"Trainer": TRAINER, "Callbacks": CALLBACKS, "Optimizers": OPTIMIZERS, "Modules": MODULES}
ROWS = [(title, name) for title, cases in TABLES.items() for name in cases]


def fit(case: Case, tmp_path: Path, by: str) -> tuple[LightningModule, Trainer, dict[str, Tensor]]:
    """Train a row by the mixin, by the callback or without an estimator; return module, trainer and earlier weights."""
    base, settings = case.module(), dict(case.trainer())
    callbacks = list(settings.pop("callbacks", []))
    if by == "mixin":
        base = type("Mixed", (zo.EstimatedGradient, base), {"estimator": case.estimator})
    elif by == "callback":
        callbacks.append(zo.GradientFree(case.estimator))
    torch.manual_seed(0)
    module = base()
    barebones = settings.get("barebones", False)
    quiet: dict[str, Any] = (
        {}
        if barebones
        else {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
    )
    where: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": tmp_path, "callbacks": callbacks}
    made = Trainer(**{"max_epochs": 2, **where, **quiet, **settings})
    before = {
        n: p.detach().clone() for n, p in module.named_parameters() if not isinstance(p, nn.UninitializedParameter)
    }
    made.fit(module)
    return module, made, before


@pytest.mark.parametrize(("title", "name"), ROWS, ids=[name for _, name in ROWS])
@pytest.mark.filterwarnings("ignore")
def test_row(title: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = TABLES[title][name]
    if case.refusal is not None:
        for by in ("mixin", "callback"):
            with pytest.raises(MisconfigurationException, match=re.escape(case.refusal)):
                fit(case, tmp_path, by)
        return
    module, made, before = fit(case, tmp_path, "mixin")
    assert made.global_step == fit(case, tmp_path, "automatic")[1].global_step > 0
    after = dict(module.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert not before or any(
        not torch.equal(p.detach().to(before[n].dtype), before[n]) for n, p in after.items() if n in before
    )
    other = dict(fit(case, tmp_path, "callback")[0].named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in after.items())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("estimator", [zo.Backprop(), zo.ZerothOrder(seed=0)], ids=["backprop", "zeroth_order"])
@pytest.mark.filterwarnings("ignore")
def test_resnet_18_by_mixin_and_callback(estimator: zo.GradientEstimator, seed: int, tmp_path: Path) -> None:
    case = Case(lambda: resnet(seed), trainer(max_steps=3, limit_val_batches=0), estimator=estimator)
    by_mixin, by_callback = (dict(fit(case, tmp_path, by)[0].state_dict()) for by in ("mixin", "callback"))
    assert all(torch.equal(value, by_callback[name]) for name, value in by_mixin.items())
    if estimator.is_exact:
        automatic = dict(fit(case, tmp_path, "automatic")[0].state_dict())
        assert all(torch.equal(value, automatic[name]) for name, value in by_mixin.items())


def test_the_page_lists_every_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for title, cases in TABLES.items():
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
        ]
        said = {row[0]: row[1] for row in rows[2:]}
        assert list(said) == list(cases)
        for name, case in cases.items():
            assert said[name].startswith("works") if case.refusal is None else case.refusal in said[name]
