"""The language model's example: in small it learns by forward passes, by the command line, and in the hub's Trainer."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import seed_everything
from torch.nn import functional as F

import zo_lightning as zo
from zo_lightning.commands import main
from zo_lightning.study.declared import read_study

pytest.importorskip("transformers")
pytest.importorskip("peft")

from examples.language_model.methods import METHODS
from examples.language_model.pretrain import pretrain
from examples.language_model.prompts import LitPrompt, Reviews, read
from examples.language_model.study import Prompted, Sentences

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "examples" / "language_model" / "sentiment.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """600 sentences of which two words in eight tell the label."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "rt_polarity").mkdir()
    draw, rest = random.Random(0), ["a", "the", "film", "plot", "of", "scene", "which", "with", "and", "one"]
    for name, telling in (("negative", ["awful", "dull", "lame"]), ("positive", ["lovely", "moving", "fresh"])):
        lines = []
        for _ in range(300):
            line = draw.choices(telling, k=2) + draw.choices(rest, k=6)
            draw.shuffle(line)
            lines.append(" ".join(line))
        (folder / "rt_polarity" / f"{name}.txt").write_text("\n".join(lines), encoding="latin-1")
    return str(folder)


@pytest.fixture(scope="module")
def model(root: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    pretrain(folder, root, vocabulary=400, width=32, epochs=(1, 10))
    return str(folder)


def test_parts_share_no_sentence(root: str) -> None:
    parts = read(root)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "test": 60,
        "val": 60,
        "pretraining": 240,
        "train": 240,
    }
    for one, other in itertools.combinations(parts.values(), 2):
        assert not {id(row) for row in one} & {id(row) for row in other}


def test_the_smoke_form_learns_by_forward_passes(root: str, model: str) -> None:
    """As a user runs it; in lean memory, 200 directions are enough for two telling words in eight."""
    command = [sys.executable, "-m", "examples.language_model", "--root", root, "--model", model, "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| sentiment")]
    assert [row[1] for row in rows] == ["all weights: MeZO, lean", "all weights: backpropagation"]
    assert float(rows[0][4]) >= float(rows[0][3]) + 0.1


def test_adapters_and_patterns_choose_what_is_trained(model: str) -> None:
    for module, word in ((LitPrompt(model, lora=2), "lora"), (LitPrompt(model, trained=("*attn*",)), "attn")):
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        assert names and all(word in name for name in names)
    with pytest.raises(ValueError, match="begin with the same token"):
        LitPrompt(model, words=(" good", " good"))


@pytest.mark.parametrize("name", ["LoRA: 16 directions", "attention: 16 directions", "all weights: PerExample"])
def test_each_way_lowers_the_loss(name: str, root: str, model: str) -> None:
    """Of the batch that it is trained on, in ten steps; the directions are those of the seed."""
    seed_everything(0, verbose=False)
    method = METHODS[name]
    module = LitPrompt(model, trained=method.trained, lora=method.lora)
    tokens, mask, labels = next(iter(Reviews(model, root, batch_size=32).train_dataloader()))
    optimizer = method.optimizer([p for p in module.parameters() if p.requires_grad], lr=method.lr)
    state, losses = method.estimator.init(module), []
    reduction = "none" if method.estimator.needs_example_losses else "mean"

    def loss() -> torch.Tensor:
        return F.cross_entropy(module(tokens, mask), labels, reduction=reduction)

    for step in range(10):
        optimizer.zero_grad()
        losses.append(method.estimator.backward(loss, module, step, state).mean().item())
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("given", "moved"),
    [([], ""), (["--model.trained", '["*.attn.*"]'], "attn"), (["--model.lora", "4"], "lora_")],
    ids=["all", "attention", "LoRA"],
)
def test_the_command_line_trains_it(
    given: list[str], moved: str, root: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = ["--model.model", model, "--data.model", model, "--data.root", root, "--trainer.accelerator", "cpu"]
    main(["fit", "-c", str(YAML), *places, "--trainer.max_steps", "2", "--model.optimizer.lr", "1e-2", *given])
    saved = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert saved["global_step"] == 2
    seed_everything(42, verbose=False)  # the adapters' start
    start = LitPrompt(model, lora=4 if moved == "lora_" else 0).state_dict()
    for name, p in saved["state_dict"].items():
        assert bool((start[name] != p).any()) == (moved in name), name


def test_as_a_task_of_a_study_it_is_the_same_net_on_the_same_sentences(root: str, model: str) -> None:
    study = read_study(ROOT / "examples" / "benchmark_sentiment.yaml")
    assert set(study.tasks) == {"sentiment"} and study.reference == "backpropagation"
    data, other = Sentences(model, root, val_size=0.1, seed=3), Reviews(model, root)
    data.setup()
    assert [len(y) for _, y in (data.train, data.val, data.test)] == [216, 24, 60]
    x, y = data.test
    tokens, mask, labels = other.sets["test"].tensors
    assert torch.equal(x, torch.stack((tokens, mask), 1)) and torch.equal(y, labels)
    torch.testing.assert_close(Prompted(model)(x), LitPrompt(model).eval()(tokens, mask))
    with pytest.raises(ValueError, match="val_size=240 must leave some of the 240"):
        Sentences(model, root, val_size=240).setup()


@pytest.mark.parametrize("config", ["LlamaConfig", "OPTConfig"])
def test_other_models_answer_and_learn(config: str, root: str, model: str, tmp_path: Path) -> None:
    """Saved on the spot and named by their folder; what fills a sentence up changes no answer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    made = getattr(transformers, config)(vocab_size=len(tokenizer), ffn_dim=64, word_embed_proj_dim=32, **sizes)
    for part in (transformers.AutoModelForCausalLM.from_config(made), tokenizer):
        part.save_pretrained(tmp_path)
    module = LitPrompt(str(tmp_path))
    tokens, mask, labels = next(iter(Reviews(str(tmp_path), root).train_dataloader()))
    length = int(mask[0].sum())
    assert length < mask.shape[1]
    alone = module(tokens[:1, -length:], mask[:1, -length:])
    torch.testing.assert_close(alone, module(tokens[:1], mask[:1]))
    zo.ZerothOrder().backward(lambda: F.cross_entropy(module(tokens, mask), labels), module, 0)
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_of_transformers_takes_the_same_steps(
    accumulated: int, root: str, model: str, tmp_path: Path
) -> None:
    """Those of a plain loop, but for the order of a batch's rows, whose mean then rounds otherwise.

    By 1e-7 at most, which over mu is 1e-4 of a slope; three steps of lr 1e-3 move a weight by 3e-7 of that.
    """
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, TrainingArguments

    from examples.language_model.hf_trainer import ZOTrainer

    tokens = next(iter(Reviews(model, root).train_dataloader()))[0][:4]
    rows = [{"input_ids": line, "labels": line} for line in tokens]
    nets = [AutoModelForCausalLM.from_pretrained(model) for _ in range(2)]
    for net in nets:
        net.config.use_cache = False
        for part in net.modules():  # the two draw their masks at different times
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4 // accumulated,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        dataloader_num_workers=0,
        seed=7,
        save_strategy="no",
        disable_tqdm=True,
    )
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3) for net in nets]
    constant = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda _: 1.0)
    trainer = ZOTrainer(nets[0], arguments, train_dataset=rows, optimizers=(optimizers[0], constant))
    trainer.estimator = zo.ZerothOrder(seed=1)
    trainer.train()
    batch = torch.stack([row["labels"] for row in rows])
    for step in range(3):
        optimizers[1].zero_grad()
        loss = lambda: nets[1](input_ids=batch, labels=batch).loss  # noqa: E731
        zo.ZerothOrder(seed=1).backward(loss, nets[1], step)
        optimizers[1].step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(model)
    moved = [(p - q).abs().max().item() for p, q in zip(nets[0].parameters(), start.parameters(), strict=True)]
    assert min(moved) > 1e-4
