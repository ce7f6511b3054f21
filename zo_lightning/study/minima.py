"""The shape of the loss where training ended: along the line between two minima, and around each."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from zo_lightning.checkpoint_io import DamagedCheckpoint, load_checked
from zo_lightning.study.declared import read_yaml
from zo_lightning.study.results import Results
from zo_lightning.study.runs import Fit, printing_to
from zo_lightning.study.weights import Progress, pairs
from zo_lightning.user_errors import UserError

EXAMPLES = 1024
POSITIONS = np.linspace(-0.25, 1.25, 31)
NOISE = 0.1
LINE = ("method", "task", "d", "seed", "position", "loss", "accuracy")
SHARPNESS = ("method", "task", "d", "seed", "loss", "increase")
_BATCH = 256

Weights = dict[str, Tensor]
Evaluate = Callable[[Weights], tuple[float, float]]


def line_between(
    a: Weights, b: Weights, evaluate: Evaluate, positions: np.ndarray = POSITIONS
) -> list[tuple[float, ...]]:
    """Position α, loss and accuracy at ``(1 − α) a + α b`` for each position (Goodfellow et al. 2015)."""
    return [(float(t), *evaluate({name: torch.lerp(w, b[name], float(t)) for name, w in a.items()})) for t in positions]


def sharpness(
    weights: Weights, evaluate: Evaluate, noise: float = NOISE, samples: int = 10, seed: int = 0
) -> tuple[float, float]:
    """The loss at a minimum, and its mean increase when every filter is displaced by a share of its own norm.

    ``E[L(w + σ ‖w_f‖ ξ_f / ‖ξ_f‖)] − L(w)``, ξ Gaussian, f a row of dimension 0 of each weight of two dimensions or
    more (filter normalisation: Li et al., *Visualizing the loss landscape of neural nets*, 2018); biases stay. Unlike
    curvature it does not change when a layer is scaled up and the next one down, which ReLU nets do not notice. It
    needs no gradient. The noise is the same for every minimum of the same net.

    Args:
        weights: the minimum.
        evaluate: gives the loss and the accuracy.
        noise: the share ``σ``.
        samples: draws of ξ.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    at = evaluate(weights)[0]
    losses = []
    for _ in range(samples):
        moved = {}
        for name, w in weights.items():
            xi = torch.randn(w.shape, generator=generator)
            moved[name] = w + noise * _rows(w) * xi / _rows(xi) if w.ndim > 1 else w
        losses.append(evaluate(moved)[0])
    return at, float(np.mean(losses)) - at


def measure_minima(
    results: Results, build: Fit, progress: Progress = lambda what: None, trusted: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate the last weights of every finished cell: the tables of `LINE` and of `SHARPNESS`.

    Loss and accuracy are those of the first `EXAMPLES` training images of the run's own data, in its first epoch's
    order. Position 0 is the reference, 1 the method. A cell without its last checkpoint is left out.

    Args:
        results: of the study.
        build: makes model and data from a configuration, and trains nothing: it is asked for 0 epochs.
        progress: told what is being done.
        trusted: whether classes are imported that are neither ours nor PyTorch's.

    Raises:
        UserError: the data cannot be read, and nothing is downloaded; or the runs name other classes.
    """
    lines, around = [], []
    partners = {ref.folder: [cell for cell, r in pairs(results) if r == ref] for _, ref in pairs(results)}
    seen = set()
    for cell in sorted(results.cells, key=lambda c: c.method != results.study.reference):  # the reference first
        if cell.folder in seen:
            continue
        group = [cell, *partners.get(cell.folder, [])]
        seen |= {one.folder for one in group}
        evaluate, weights = None, {}
        for one in group:
            saved = _last_weights(results.folder / one.folder)
            if saved is None:
                continue
            if evaluate is None:
                progress(f"minimum of {one}")
                evaluate = _evaluation(results.folder / one.folder, build, trusted)
            weights[one] = saved
            key = (one.method, one.task, results.tasks[one.task], one.seed)
            around.append((*key, *sharpness(saved, evaluate)))
            if one != cell and cell in weights:
                lines += [(*key, *point) for point in line_between(weights[cell], saved, evaluate)]
    return pd.DataFrame(lines, columns=list(LINE)), pd.DataFrame(around, columns=list(SHARPNESS))


def _rows(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True).clamp_min(1e-30)


def _last_weights(run: Path) -> Weights | None:
    try:
        checkpoint = load_checked(run / "checkpoints" / "last.ckpt")
        return {name: w for name, w in checkpoint["state_dict"].items() if w.is_floating_point()}
    except (DamagedCheckpoint, OSError, AttributeError):  # the last one: of something that is no tensor
        return None


def _evaluation(run: Path, build: Fit, trusted: bool) -> Evaluate:
    config = read_yaml(run / "config.yaml")
    data = config.get("data")
    data = data if isinstance(data, dict) else {"class_path": data}
    if not trusted:
        config = _without_code(config, data, run)
    offline = ["--data.download", "false"] if "download" in (data.get("init_args") or {}) else []
    silent = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"]
    with TemporaryDirectory() as folder, printing_to(io.StringIO()):
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        trainer = build(["-c", str(file), "--trainer.max_epochs", "0", *offline, *silent])
    module = trainer.lightning_module.eval()
    images, labels = _examples(trainer.datamodule.train_dataloader())
    return lambda weights: _evaluate(module, weights, images, labels)


def _without_code(config: dict[str, Any], data: dict[str, Any], run: Path) -> dict[str, Any]:
    """The net and the data of a configuration, whose classes are ours or PyTorch's: naming others imports them.

    Raises:
        UserError: they are not.
    """
    model = config.get("model")
    net = model.get("net") if isinstance(model, dict) else None
    foreign = [name for name in _dotted(net) if not name.startswith(("zo_lightning.", "torch.nn."))]
    if net is None or isinstance(model, dict) and "class_path" in model:
        foreign.append(str(model.get("class_path")) if isinstance(model, dict) else str(model))
    foreign += [name for name in _dotted(data.get("class_path")) if not name.startswith("zo_lightning.data.")]
    if foreign:
        raise UserError(
            f"'{run / 'config.yaml'}' names {foreign[0]}, which a report does not import unless it is told to: add "
            "--trust where the code is yours"
        )
    model = {"net": net, "estimator": "zo_lightning.Backprop"}
    return {"seed_everything": config.get("seed_everything"), "model": model, "data": data}


def _dotted(value: Any) -> Iterator[str]:
    """All texts in a configuration that could name something to import."""
    if isinstance(value, str) and "." in value:
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dotted(one)


@torch.no_grad()
def _evaluate(module: nn.Module, weights: Weights, images: Tensor, labels: Tensor) -> tuple[float, float]:
    module.load_state_dict(weights, strict=False)
    logits = torch.cat([module(batch) for batch in images.split(_BATCH)])
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def _examples(batches: Any) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for image, label in _until(batches):
        images.append(image)
        labels.append(label)
    return torch.cat(images)[:EXAMPLES], torch.cat(labels)[:EXAMPLES]


def _until(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    count = 0
    for image, label in batches:
        yield image, label
        count += len(label)
        if count >= EXAMPLES:
            return
