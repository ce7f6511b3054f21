"""Fine-tuning by a prompt: any language model of ``transformers`` as a LightningModule, and sentences with labels."""

import random
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, WORDS = " it was", (" bad", " good")
LENGTH = 28  # tokens


def read(root: str = "data") -> dict[str, list[tuple[str, int]]]:
    """rt_polarity, sentences of film reviews and whether they praise (Pang and Lee 2005), in four parts."""
    names = enumerate(("negative.txt", "positive.txt"))
    lines = {y: Path(root, "rt_polarity", name).read_text(encoding="latin-1").split("\n") for y, name in names}
    rows = [(" " + line.strip(), y) for y in lines for line in lines[y] if line.strip()]
    random.Random(0).shuffle(rows)
    tenth, middle = len(rows) // 10, (2 * (len(rows) // 10) + len(rows)) // 2
    bounds = {
        "test": (0, tenth),
        "val": (tenth, 2 * tenth),
        "pretraining": (2 * tenth, middle),
        "train": (middle, None),
    }
    return {part: rows[slice(*bound)] for part, bound in bounds.items()}


def encode(tokenizer: Any, rows: list[tuple[str, int]], prompt: str = PROMPT, length: int = LENGTH) -> TensorDataset:
    """Tokens, their mask and labels: each sentence cut so that the prompt is its end, and filled up at the left."""
    end = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens, masks = [], []
    for text, _ in rows:
        sentence = tokenizer(text, add_special_tokens=False)["input_ids"][: length - len(first) - len(end)]
        line = first + sentence + end
        masks.append([0] * (length - len(line)) + [1] * len(line))
        tokens.append([tokenizer.eos_token_id] * (length - len(line)) + line)
    return TensorDataset(torch.tensor(tokens), torch.tensor(masks), torch.tensor([label for _, label in rows]))


def answers(tokenizer: Any, prompt: str, words: tuple[str, str]) -> list[int]:
    """The first token of each answer to a prompt."""
    end = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    found = [tokenizer(prompt + word, add_special_tokens=False)["input_ids"][end] for word in words]
    if found[0] == found[1]:
        raise ValueError(f"words {words[0]!r} and {words[1]!r} begin with the same token: choose others")
    return found


def answered(net: Any, tokens: Tensor, mask: Tensor, choices: list[int]) -> Tensor:
    """The logits [B, 2] of the answers to sentences [B, L], which are filled up at the left."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = net(input_ids=tokens, attention_mask=mask, position_ids=places, logits_to_keep=1, use_cache=False)
    return out.logits[:, -1, choices]


class Reviews(LightningDataModule):
    """Sentences for a model's tokenizer. ``part`` is what is trained on: ``train``, or what pretraining has used."""

    def __init__(
        self,
        model: str,
        root: str = "data",
        prompt: str = PROMPT,
        part: str = "train",
        batch_size: int = 16,
        length: int = LENGTH,
    ) -> None:
        super().__init__()
        tokenizer, rows = AutoTokenizer.from_pretrained(model), read(root)
        self.sets = {name: encode(tokenizer, rows[name], prompt, length) for name in (part, "val", "test")}
        self.part, self.batch_size = part, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets[self.part], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["val"], 200)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["test"], 200)


class LitPrompt(LightningModule):
    """A causal language model that answers by its next word, as in MeZO (Malladi et al. 2023).

    Args:
        model: a folder of ``save_pretrained``, or a name of the Hugging Face hub.
        prompt: what follows each sentence.
        words: the answers, by label; their first tokens must differ.
        trained: patterns of names, such as ``*attn*``: the weights that are trained, all others are frozen.
        lora: rank of adapters in all linear layers, which are trained in place of the weights; 0 for none.
        optimizer: makes one; its learning rate decays to 0 linearly.
    """

    def __init__(
        self,
        model: str,
        prompt: str = PROMPT,
        words: tuple[str, str] = WORDS,
        trained: tuple[str, ...] = ("*",),
        lora: int = 0,
        optimizer: OptimizerCallable = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.net: Any = AutoModelForCausalLM.from_pretrained(model)
        self.answers = answers(AutoTokenizer.from_pretrained(model), prompt, words)
        if lora:
            self.net = get_peft_model(self.net, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear"))
        else:
            for name, p in self.net.named_parameters():
                p.requires_grad_(any(fnmatch(name, pattern) for pattern in trained))
        self.make_optimizer = optimizer

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The logits of the answers."""
        return answered(self.net, tokens, mask, self.answers)

    def training_step(self, batch: list[Tensor], _: int) -> dict[str, Tensor]:
        losses = F.cross_entropy(self(*batch[:2]), batch[2], reduction="none")
        self.log("train/loss", losses.mean())
        return {"loss": losses.mean(), "losses": losses}

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val/acc", (self(*batch[:2]).argmax(1) == batch[2]).float().mean(), prog_bar=True)

    def test_step(self, batch: list[Tensor], _: int) -> None:
        self.log("test/acc", (self(*batch[:2]).argmax(1) == batch[2]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
