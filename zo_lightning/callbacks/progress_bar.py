"""How a run gets on: a bar in a terminal, lines where the output is kept."""

import sys
import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar; where the output is no terminal, a line per epoch in its place.

    The line holds the metrics of the bar (``prog_bar=True``), each as it was last logged.

    Args:
        refresh_rate: batches from one change of the bar to the next; 0: neither bar nor lines.
        process_position: lines to leave free above the bar.
        leave: leave the bar of an epoch when the next begins.
        every_seconds: the least time from one line to the next, for short epochs; the last epoch has its line always.
    """

    def __init__(
        self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False, every_seconds: float = 5.0
    ) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self.every_seconds = every_seconds
        self._lines = False
        self._line = ""
        self._began = self._printed = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See what the output is."""
        super().setup(trainer, pl_module, stage)  # switches the bar off on all processes but one
        if self.is_enabled and not sys.stdout.isatty():
            self._lines = True
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics of the bar, without the run's number: several loggers have none, or several."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print around the bar, or as usual where there is none."""
        if self._lines:
            print(*args, sep=sep, **kwargs)
        else:
            super().print(*args, sep=sep, **kwargs)

    def on_train_start(self, *_: Any) -> None:
        """Begin to count the time."""
        super().on_train_start(*_)
        self._began, self._printed = time.perf_counter(), float("-inf")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line, where it is time for one."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self._lines:
            return
        last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        shown = [f"{name} {_short(value)}" for name, value in self.get_metrics(trainer, pl_module).items()]
        seconds = time.perf_counter() - self._began
        self._line = f"epoch {trainer.current_epoch + 1}{last}: {', '.join([*shown, f'{seconds:.0f} s'])}"
        if time.perf_counter() - self._printed >= self.every_seconds:
            self._print_line()

    def on_train_end(self, *_: Any) -> None:
        """Print the last epoch's line."""
        super().on_train_end(*_)
        self._print_line()

    def _print_line(self) -> None:
        if self._line:
            print(self._line, flush=True)
        self._line, self._printed = "", time.perf_counter()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
