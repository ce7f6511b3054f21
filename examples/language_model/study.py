"""The sentiment task as a net and data of classification, which a study of methods takes as one of its tasks.

python -m examples.language_model.pretrain --root data --out small_gpt2
zo-lightning study -c examples/benchmark_sentiment.yaml --data.root data
"""

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.language_model.prompts import PROMPT, WORDS, answered, answers, encode, read
from zo_lightning.data.batches import ShuffledBatches, TensorBatches


class Prompted(nn.Module):
    """Sentences that end with a prompt to the logits [B, 2] of its two answers.

    Args:
        model: a folder of ``save_pretrained``, or a name of the Hugging Face hub.
    """

    def __init__(self, model: str = "small_gpt2") -> None:
        super().__init__()
        self.net = AutoModelForCausalLM.from_pretrained(model)
        self.answers = answers(AutoTokenizer.from_pretrained(model), PROMPT, WORDS)

    def forward(self, sentences: Tensor) -> Tensor:
        """Take tokens and their mask, [B, 2, L]."""
        return answered(self.net, sentences[:, 0], sentences[:, 1], self.answers)


class Sentences(LightningDataModule):
    """Reviews as tokens and their mask, [n, 2, L], and whether they praise.

    Args:
        model: whose tokens.
        root: folder that holds ``rt_polarity``.
        batch_size: sentences per batch.
        val_size: the number of training sentences that are held out, or their share; 0 validates on the test set.
        seed: decides the split and the order of the batches; None takes PyTorch's own.
    """

    num_classes = 2

    def __init__(
        self,
        model: str = "small_gpt2",
        root: str = "data",
        batch_size: int = 16,
        val_size: int | float = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.root, self.batch_size, self.val_size = model, root, batch_size, val_size
        self.seed = torch.initial_seed() if seed is None else seed

    def setup(self, stage: str | None = None) -> None:
        """Read and split the sentences."""
        tokenizer, rows = AutoTokenizer.from_pretrained(self.model), read(self.root)
        held_out = round(self.val_size * len(rows["train"])) if self.val_size < 1 else int(self.val_size)
        if not 0 <= held_out < len(rows["train"]):
            raise ValueError(f"val_size={self.val_size} must leave some of the {len(rows['train'])} training sentences")
        (x, y), self.test = (self._tensors(tokenizer, rows[part]) for part in ("train", "test"))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed % 2**63))
        self.train = x[order[held_out:]], y[order[held_out:]]
        self.val = (x[order[:held_out]], y[order[:held_out]]) if held_out else self.test

    def train_dataloader(self) -> ShuffledBatches:
        """In a new order every epoch."""
        return ShuffledBatches(*self.train, self.batch_size, self.seed)

    def val_dataloader(self) -> TensorBatches:
        """What was held out, or else the test set."""
        return TensorBatches(*self.val, 256)

    def test_dataloader(self) -> TensorBatches:
        """The test set."""
        return TensorBatches(*self.test, 256)

    @staticmethod
    def _tensors(tokenizer: object, rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        tokens, masks, labels = encode(tokenizer, rows, PROMPT, 28).tensors
        return torch.stack((tokens, masks), 1), labels
