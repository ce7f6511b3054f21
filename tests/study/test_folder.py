"""A study's folder is the study's own."""

import fcntl
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.study.stand_in import study
from zo_lightning.study.folder import claim, read_declaration
from zo_lightning.study.grid import Method, Study
from zo_lightning.user_errors import UserError


class TestClaim:
    def test_same_study_and_a_grown_one_may_go_on(self, folder: Path) -> None:
        claim(study(1, A="work"), folder)
        claim(study(1, A="work"), folder)
        claim(study(1, 2, A="work", B="work"), folder)
        assert read_declaration(folder).cells() == study(1, 2, A="work", B="work").cells()

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (study(1, A="else"), "another configuration of A, SmallCNN, seed 1: model.do is 'work' there and 'else'"),
            (study(2, A="work"), "a cell that this one lacks .A, SmallCNN, seed 1."),
            (study(1, A="work", options=("--data.root", "x")), "a study with the options '', not '--data.root x'"),
        ],
    )
    def test_other_study_is_refused_and_nothing_changes(self, folder: Path, other: Study, message: str) -> None:
        claim(study(1, A="work"), folder)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=message):
            claim(other, folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def test_exception_of_a_task_is_named_by_its_first_key(self, folder: Path) -> None:
        method = Method(({"model": {"do": "work"}},), {})
        plain = Study("fake", (), {"A": method}, {"ScalableCNN 2": ({},)}, (1,), "A")
        claim(plain, folder)
        exception = {"model": {"optimizer": {"class_path": "torch.optim.Adam"}}}
        special = replace(method, by_task={"ScalableCNN 2": exception})
        message = "seed 1: model is absent there and {'optimizer': {'class_path': 'torch.optim.Adam'}} here; choose"
        with pytest.raises(UserError, match=re.escape(message)):
            claim(replace(plain, methods={"A": special}), folder)

    def test_options_may_be_written_with_an_equals_sign(self, folder: Path) -> None:
        claim(study(1, A="work", options=("--data.root", "x=y")), folder)
        claim(study(1, A="work", options=("--data.root=x=y",)), folder)
        with pytest.raises(UserError, match="a study with the options '--data.root=x=y', not '--data.root=y'"):
            claim(study(1, A="work", options=("--data.root=y",)), folder)

    def test_claim_that_was_stopped_is_no_foreign_folder(self, folder: Path) -> None:
        (folder / ".study.yaml.new").touch()
        claim(study(1, A="work"), folder)
        assert read_declaration(folder).name == "fake"

    def test_running_study_keeps_its_declaration(self, folder: Path) -> None:
        claim(study(1, A="work"), folder)
        before = (folder / "study.yaml").read_bytes()
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="another process is running the study in"):
                claim(study(1, 2, A="work"), folder)
        assert (folder / "study.yaml").read_bytes() == before

    def test_foreign_folder_is_refused(self, folder: Path) -> None:
        (folder / "thesis.txt").touch()
        with pytest.raises(UserError, match="holds something that is no study"):
            claim(study(1, A="work"), folder)
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
        with pytest.raises(UserError, match="is a file"):
            claim(study(1, A="work"), folder / "thesis.txt")

    @pytest.mark.parametrize("content", ["", "name: x\n", "methods: [1\n", "just words\n"])
    def test_damaged_declaration_is_told(self, folder: Path, content: str) -> None:
        (folder / "study.yaml").write_text(content)
        with pytest.raises(UserError, match="study.yaml"):
            read_declaration(folder)
