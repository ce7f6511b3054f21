"""What the command line leaves out of Lightning's messages, and what it does not."""

import logging
import warnings

import pytest

from zo_lightning import noise

CKPT = "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided"
BATCHES = "The number of training batches (2) is smaller than the logging interval Trainer(log_every_n_steps=10)."


@pytest.mark.parametrize(
    ("message", "module", "is_said"),
    [
        (CKPT, "pytorch_lightning.trainer.call", False),
        (CKPT, "their_package.trainer", True),  # the same words of somebody else
        (BATCHES, "pytorch_lightning.loops.fit_loop", True),  # which a user can mend
    ],
)
def test_warnings_are_left_out_one_by_one(message: str, module: str, is_said: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        noise.leave_out()
        warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module, registry={})
    assert len(said) == is_said


def test_advertisements_are_left_out_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    noise.leave_out()
    filters = len(logger.filters)
    noise.leave_out()
    assert len(logger.filters) == filters
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("💡 Tip: For seamless cloud logging and experiment tracking, try installing something")
        logger.info("GPU available: True (cuda), used: True")
    assert caplog.messages == ["GPU available: True (cuda), used: True"]
