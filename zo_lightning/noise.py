"""What Lightning prints and a user of the command line can do nothing about."""

import logging
import warnings

_WARNINGS = (
    (FutureWarning, r".*isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    (UserWarning, r"The dirpath has changed from"),
    (UserWarning, r"Couldn't infer the batch indices fetched from your dataloader"),
)
"""Of Lightning's own calls, and of what the command line sets up itself: kind, and the message's beginning."""

_LOGGED = ("Tip: For seamless", "💡 Tip", "TPU available: False")


def leave_out() -> None:
    """Let these messages, and no others, be left out from now on in this process."""
    for kind, message in _WARNINGS:
        warnings.filterwarnings("ignore", message, kind, r"pytorch_lightning\.")
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_news)  # once, however often it is added


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)
