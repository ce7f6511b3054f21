"""Update rules that ``torch.optim`` lacks, one per file."""

from zo_lightning.optim.adamm import AdaMM
from zo_lightning.optim.base import UpdateRule
from zo_lightning.optim.normalized_sgd import NormalizedSGD
from zo_lightning.optim.separable import is_separable
from zo_lightning.optim.sign_sgd import SignSGD

__all__ = ["AdaMM", "NormalizedSGD", "SignSGD", "UpdateRule", "is_separable"]
