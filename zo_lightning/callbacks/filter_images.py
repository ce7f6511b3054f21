"""Convolution filters as pictures."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from zo_lightning.callbacks.reporting import log_image, say_once
from zo_lightning.callbacks.weight_snapshots import check_at_least_1
from zo_lightning.filters import filter_grid, filters_of


class FilterImages(Callback):
    """The filters of every convolution as one grid, ``filters/<name>``, at the start and every n epochs.

    Filters of three input channels in the first convolution are RGB, of one channel grey; deeper ones are a row each,
    with one grey square per input channel. Zero is mid-grey. Each layer has one scale, ``headroom`` times its largest
    weight when it is first seen, so that epochs can be compared; what grows beyond is black or white. A net without
    convolutions is said once.

    Args:
        every_n_epochs: epochs from one picture to the next.
        max_filters: filters shown of a layer, the first ones.
        max_channels: input channels shown of a filter.
        headroom: how much larger weights may grow before they saturate.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self, every_n_epochs: int = 1, max_filters: int = 32, max_channels: int = 16, headroom: float = 1.5
    ) -> None:
        check_at_least_1(every_n_epochs=every_n_epochs, max_filters=max_filters, max_channels=max_channels)
        if not headroom >= 1:
            raise ValueError(f"headroom must be at least 1, got {headroom}")
        self.every_n_epochs = every_n_epochs
        self.max_filters = max_filters
        self.max_channels = max_channels
        self.headroom = headroom
        self._scales: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """By the interval, since several instances are plausible."""
        return self._generate_state_key(every_n_epochs=self.every_n_epochs)

    def state_dict(self) -> dict[str, Any]:
        """The scales, so that a resumed run's pictures compare with those before."""
        return {"scales": dict(self._scales)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scales."""
        self._scales = dict(state_dict["scales"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where there is nothing to show."""
        if stage == "fit" and not filters_of(pl_module):
            say_once(f"FilterImages does nothing: {type(pl_module).__name__} has no convolution")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the filters as they were initialised."""
        if trainer.global_step == 0:
            self._scales = {}
            self._show(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Show the filters at the end of an epoch."""
        if trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for position, (name, weight) in enumerate(filters_of(module).items()):
            filters = weight.detach().float().cpu()
            if name not in self._scales:
                self._scales[name] = self.headroom * (float(filters.abs().max()) or 1.0)
            shown = filters[: self.max_filters, : 3 if position == 0 and filters.shape[1] == 3 else self.max_channels]
            log_image(trainer, f"filters/{name}", filter_grid(shown, self._scales[name], rgb=position == 0))
