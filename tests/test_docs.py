"""README and documentation: their code is run, their command lines are parsed, and the reference is complete."""

import builtins
import re
import shlex
import symtable
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger

import zo_lightning as zo
from zo_lightning import callbacks, data
from zo_lightning.cli import CLI
from zo_lightning.commands import main
from zo_lightning.snapshots import write_snapshot
from zo_lightning.user_errors import CommandParser

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": ROOT / "README.md", **{page.name: page for page in sorted((ROOT / "docs").glob("*.md"))}}
ELSEWHERE = {"distributed.md": "tests/test_cli_processes.py, under torchrun"}
"""Pages whose Python another test runs."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def of_runs(_: pytest.MonkeyPatch) -> dict[str, Any]:
    """A module whose run has a checkpoint, in ``version_3``."""
    names = {"module": BoringModel(), "data": BoringModel().train_dataloader()}
    logger = CSVLogger(".", version=3)
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callbacks.LastCheckpoint()], logger=logger)
    trainer.fit(names["module"], names["data"])
    return names


def of_pictures(_: pytest.MonkeyPatch) -> dict[str, Any]:
    for part in ("train", "val"):
        for name, color in (("dark", 40), ("light", 200)):
            (folder := Path("pictures", part, name)).mkdir(parents=True)
            for k in range(4):
                Image.new("RGB", (40, 30), (color + k, color, color)).save(folder / f"{k}.png")
    return {}


def of_snapshots(_: pytest.MonkeyPatch) -> dict[str, Any]:
    write_snapshot(Path("lightning_logs/version_0/snapshots"), {"net.conv1.weight": torch.ones(3)}, step=10, epoch=1)
    return {}


def of_study(patched: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study whose loss grows as d^0.25."""
    rows = [
        {
            "method": method,
            "task": f"{d}",
            "d": d,
            "seed": seed,
            "epoch": 50,
            "train_loss": loss,
            "val_loss": loss,
            "val_accuracy": 0.9,
        }
        for d in (1400, 169_196)
        for seed in (42, 43)
        for method, loss in (("FO-AdaMM", 1.0), ("ZO-AdaMM", d**0.25))
    ]
    read = SimpleNamespace(table=pd.DataFrame(rows))
    patched.setattr("zo_lightning.study.results.read_results", lambda folder: read)
    return {}


def of_tuning(_: pytest.MonkeyPatch) -> dict[str, Any]:
    class ZONet(zo.EstimatedGradient, BoringModel):
        estimator = zo.ZerothOrder(seed=0)
        lr = 1e-3

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return {"ZONet": ZONet, "data": BoringModel().train_dataloader()}


GIVEN: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "observe.md": of_snapshots,
    "runs.md": of_runs,
    "study.md": of_study,
    "tuning.md": of_tuning,
    "your_data.md": of_pictures,
}
"""What the reader of a page has: data, runs, and what a comment of the page says."""

PRINTED: dict[str, list[Callable[[list[str]], bool]]] = {
    "other_projects.md": [lambda words: words == ["4", "64"]],
    "black_boxes.md": [
        lambda words: float(words[-1]) > 0.85 > float(words[1]),
        lambda words: " ".join(words) == "[1. 1.] 8002 all 1000 steps taken",
        lambda words: float(words[-2]) < 0.5 and words[-1] == "62",
        lambda words: float(words[2]) < 0.3 < float(words[0]),
        lambda words: float(words[1]) > 0.9,
        lambda words: float(words[0]) < 0.1 and words[1] == "2.0",
    ],
    "observe.md": [lambda words: words[:2] == ["1", "10"]],
    "study.md": [lambda words: words == ["0.25", "[0.25,", "0.25]"]],
}
"""What those blocks of a page print that print something: at least what shows that they did what they say."""


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE])
def test_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page share their names, in their order."""
    if "onnxruntime" in PAGES[page].read_text(encoding="utf-8"):
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    printed = []
    with warnings.catch_warnings(), patch.dict("zo_lightning.perturbed.rules.RULES"):  # one page adds a rule
        warnings.simplefilter("ignore")
        names = {"__name__": "page", **GIVEN.get(page, lambda _: {})(monkeypatch)}
        for block in blocks(page, "python"):
            capsys.readouterr()
            exec(compile(block, str(PAGES[page]), "exec"), names)
            if "print(" in block:
                printed.append(capsys.readouterr().out.strip().splitlines()[-1].split())
    expected = PRINTED.get(page, [])
    assert len(printed) == len(expected)
    for words, holds in zip(printed, expected, strict=True):
        assert holds(words), words


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_names_are_defined_or_explained(page: str) -> None:
    """What a block uses is made by it or a block before it, or its comments say what it is."""
    known = set(dir(builtins))
    for block in blocks(page, "python"):
        used, defined = names_of(block)
        comments = " ".join(re.findall(r"#(.*)", block))
        unknown = {name for name in used - defined - known if not re.search(rf"\b{name}\b", comments)}
        assert not unknown, f"{page}: {', '.join(sorted(unknown))} in\n{block}"
        known |= defined


def names_of(block: str) -> tuple[set[str], set[str]]:
    """The global names that code uses, and those that it makes."""
    used, defined = set(), set()
    tables = [top := symtable.symtable(block, "page", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            made = symbol.is_assigned() or symbol.is_imported()
            if table is top and made:
                defined.add(symbol.get_name())
            elif symbol.is_referenced() and (table is top or symbol.is_global()):
                used.add(symbol.get_name())
    return used, defined


class _Parsed(Exception):
    """The end of a command line's test: it has been understood."""


def _parsed(*_: Any, **__: Any) -> None:
    raise _Parsed


def command_lines(page: str) -> Iterator[list[str]]:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "zo-lightning" in words[:1]:
                yield words[1:]
            elif "zo_lightning" in words:
                yield words[words.index("zo_lightning") + 1 :]


def needs(page: str) -> list[tuple[str, list[str]]]:
    return [(f"{page}: {' '.join(words)}", words) for words in command_lines(page)]


LINES = dict(line for page in PAGES for line in needs(page))
THEIRS = "from zo_lightning import SmallCNN as MyNet\nfrom pytorch_lightning.demos.boring_classes import BoringModel\n"


@pytest.fixture
def their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What command lines name: runs, projects, files of one's own, and the repository's examples."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zo-lightning"])
    Path("their_package.py").write_text(f"{THEIRS}class LitNet(BoringModel): pass\n")
    Path("my_package.py").write_text(THEIRS + "\n".join(blocks("your_data.md", "python")[:3]))
    for name in ("version_0", "version_3"):
        (run := Path("lightning_logs", name)).mkdir(parents=True)
        (run / "config.yaml").write_text("{}")
    yield
    for name in ("their_package", "my_package"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("their_files")
@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
def test_command_lines_are_understood(words: list[str]) -> None:
    """Parsed by the parser of the program itself, which then stops: nothing is trained."""
    parse = CommandParser.parse_args

    def parse_only(self: CommandParser, *given: Any) -> Any:
        parse(self, *given)
        raise _Parsed

    with (
        patch("zo_lightning.cli.read_checkpoint"),
        patch("zo_lightning.study.plan.check", _parsed),
        patch.object(CLI, "instantiate_classes", _parsed),
        patch.object(CommandParser, "parse_args", parse_only),
        pytest.raises(_Parsed),
    ):
        main(words)


def test_the_reference_is_complete() -> None:
    """Each public name has a place of its own, and one only."""
    named = [
        name
        for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    expected = {f"zo_lightning.{name}" for name in zo.__all__ if not name.startswith("__")}
    expected |= {f"zo_lightning.callbacks.{name}" for name in callbacks.__all__ if name not in zo.__all__}
    expected |= {f"zo_lightning.data.{name}" for name in data.__all__}
    assert sorted(named) == sorted(expected)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_links_lead_somewhere() -> None:
    """To files that exist, and to headings of them."""
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = page if not path else page.parent / path
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {_anchor(head) for head in heads}, f"{page.name}: {target}"


def _anchor(head: str) -> str:
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower())
