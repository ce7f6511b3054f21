"""A small GPT-2 made on the spot, by backpropagation, in place of a download: about a minute of one core.

    python -m examples.language_model.pretrain --root data --out small_gpt2

First on text alone: the sentences of all parts but "val" and "test", no labels. Then on another task: whether the
sentences of the part "pretraining", which fine-tuning never sees, are followed by " worth it ? yes" or "no".
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from examples.language_model.methods import QUIET
from examples.language_model.prompts import PROMPT, WORDS, LitPrompt, Reviews, encode, read

OTHER, ANSWERS = " worth it ?", (" no", " yes")


def tokenizer_of(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``size`` tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def pretrain(out: Path, root: str, vocabulary: int = 4000, width: int = 64, epochs: tuple[int, int] = (3, 3)) -> None:
    """Make the tokenizer and the net, train it on text and then on the other task, and save both in ``out``."""
    seed_everything(42, verbose=False)
    parts = read(root)
    rows = parts["pretraining"] + parts["train"]
    taught = [text for text, _ in rows] + [PROMPT + word for word in WORDS] + [OTHER + word for word in ANSWERS]
    tokenizer = tokenizer_of(taught, vocabulary)
    sizes: Any = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": width, "n_layer": 2, "n_head": 4}
    net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    tokens, masks, _ = encode(tokenizer, rows, "", 28).tensors
    steps = epochs[0] * len(tokens) // 32
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(tokens), (32,))
        x, mask = tokens[chosen], masks[chosen]
        logits = net(input_ids=x, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        targets = x.masked_fill(mask == 0, -100)[:, 1:]
        optimizer.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        schedule.step()
    for made in (net, tokenizer):
        made.save_pretrained(out)
    module = LitPrompt(str(out), OTHER, ANSWERS, optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05))
    data = Reviews(str(out), root, OTHER, "pretraining", batch_size=32)
    trainer = Trainer(max_epochs=epochs[1], enable_progress_bar=False, **QUIET)
    trainer.fit(module, data)
    print(f"{out}: {net.num_parameters():,} weights, {trainer.callback_metrics['val/acc']:.3f} after '{OTHER}'")
    module.net.save_pretrained(out)


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds rt_polarity")
    parser.add_argument("--out", type=Path, default=Path("small_gpt2"), help="folder of the checkpoint")
    options = parser.parse_args()
    pretrain(options.out, options.root)


if __name__ == "__main__":
    main()
