"""The sentiment task as a net and data of classification, which a study of methods takes as one of its tasks.

python -m examples.language_model.pretrain --root data --out small_gpt2
zo-lightning study -c examples/benchmark_sentiment.yaml --data.root data
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.language_model.prompts import PROMPT, WORDS, answered, answers, encode, read
from examples.split_data import Pair, SplitData


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


class Sentences(SplitData):
    """Reviews as tokens and their mask, [n, 2, L], and whether they praise.

    Args:
        model: whose tokens.
        root: folder that holds ``rt_polarity``.
        batch_size, val_size, seed: as those of `SplitData`.
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
        super().__init__(batch_size, val_size, seed, root)
        self.model = model

    def load(self) -> tuple[Pair, Pair]:
        """Read the sentences."""
        tokenizer, rows = AutoTokenizer.from_pretrained(self.model), read(self.root)
        train, test = (encode(tokenizer, rows[part]).tensors for part in ("train", "test"))
        return (torch.stack(train[:2], 1), train[2]), (torch.stack(test[:2], 1), test[2])
