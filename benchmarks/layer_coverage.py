"""Which share of the weights of well-known nets ``PerExample`` displaces by one direction for the whole batch.

Nets are built without trained weights, in training mode, from torchvision, timm (its small ``test_*`` nets) and
transformers (small configurations); what of them no rule covers is printed, with the reason.

    python benchmarks/layer_coverage.py [--only torchvision timm transformers] [--match resnet]
"""

import argparse
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning import PerExample

BATCH = 3

Net = tuple[nn.Module, Callable[[], Any]]
"""A net, and its output for a batch."""


def torchvision_nets() -> Iterator[tuple[str, Callable[[], Net]]]:
    """The classifiers and the fully convolutional segmentation nets."""
    from torchvision import models

    def build(name: str, module: Any) -> Net:
        size = 64
        options: dict[str, Any] = {}
        if name.startswith("vit"):
            size = options["image_size"] = 56 if name.endswith("14") else 64
        elif name == "maxvit_t":
            size, options["input_size"] = 224, (224, 224)
        elif name == "inception_v3":
            size = 299
        if module is not models:
            options["weights_backbone"] = None
        net, x = models.get_model(name, weights=None, **options), torch.randn(BATCH, 3, size, size)
        return net, lambda: net(x)

    for module in (models, models.segmentation):
        for name in models.list_models(module=module):
            yield name, lambda name=name, module=module: build(name, module)


def timm_nets() -> Iterator[tuple[str, Callable[[], Net]]]:
    """The small nets for tests, one of each kind."""
    timm: Any = importlib.import_module("timm")

    def build(name: str) -> Net:
        net: Any = timm.create_model(name, pretrained=False)
        x = torch.randn(BATCH, *net.pretrained_cfg["input_size"])
        return net, lambda: net(x)

    for name in timm.list_models("test_*"):
        yield name, lambda name=name: build(name)


def transformers_nets() -> Iterator[tuple[str, Callable[[], Net]]]:
    """One net of each kind, with both ways to compute attention."""
    t: Any = importlib.import_module("transformers")
    t.logging.set_verbosity_error()
    ids = torch.randint(3, 50, (BATCH, 7))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    words = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    image = {"pixel_values": torch.randn(BATCH, 3, 32, 32)}
    swin = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    nets: list[tuple[Any, Any, dict[str, Any]]] = [
        (t.BertForSequenceClassification, t.BertConfig(**small, **words), {"input_ids": ids}),
        (
            t.DistilBertForSequenceClassification,
            t.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
            {"input_ids": ids},
        ),
        (t.RobertaForSequenceClassification, t.RobertaConfig(**small, **words), {"input_ids": ids}),
        (t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_layer=2, n_head=4, **words), {"input_ids": ids}),
        (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**small, **words), {"input_ids": ids}),
        (t.LlamaForCausalLM, t.LlamaConfig(**small, **words), {"input_ids": ids}),
        (
            t.T5ForConditionalGeneration,
            t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
            {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        ),
        (t.ViTForImageClassification, t.ViTConfig(image_size=32, patch_size=8, **small), image),
        (t.SwinForImageClassification, t.SwinConfig(image_size=32, patch_size=2, **swin), image),
    ]

    def build(kind: Any, config: Any, inputs: dict[str, Any], way: str) -> Net:
        config._attn_implementation = way
        net = kind(config)
        given = {name: x.to(net.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        return net, lambda: net(**given)

    for kind, config, inputs in nets:
        for way in ("sdpa", "eager"):
            yield f"{kind.__name__}, {way}", lambda n=(kind, config, inputs, way): build(*n)


SOURCES = {"torchvision": torchvision_nets, "timm": timm_nets, "transformers": transformers_nets}


def first_tensor(output: Any) -> Tensor:
    """A net's main output, which may be in a tuple, a dictionary or a dataclass."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return first_tensor(next(value for value in values if value is not None))


def coverage(net: nn.Module, output: Callable[[], Any]) -> tuple[float, dict[str, str]]:
    """The share of the weights' numbers with one direction for the whole batch, and these weights with the reason."""
    shared = PerExample(seed=0).shared_weights(lambda: first_tensor(output()).flatten(1).tanh().square().sum(1), net)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    return sum(sizes[name] for name in shared) / sum(sizes.values()), shared


def main() -> None:
    """Print one row for each net, and each reason once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--match", default="", help="part of the names of nets")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print("| net | weights | share on one direction | which |\n|---|---|---|---|")
    for source in arguments.only:
        for name, build in SOURCES[source]():
            if arguments.match not in name:
                continue
            net, output = build()
            share, shared = coverage(net.train(), output)
            count = sum(p.numel() for p in net.parameters())
            some = f"{len(shared)}, such as {next(iter(shared.items()))}" if shared else ""
            print(f"| {name} | {count:,} | {share:.2%} | {some} |", flush=True)


if __name__ == "__main__":
    main()
