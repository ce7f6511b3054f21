"""The configurations that come with the package: from any folder, by short names."""

from pathlib import Path

import pytest
import yaml

from zo_lightning.__main__ import main
from zo_lightning.presets import CONFIGS, find, names, with_paths
from zo_lightning.user_errors import UserError


@pytest.mark.parametrize("name", ["estimator/backprop", "estimator/backprop.yaml", "configs/estimator/backprop.yaml"])
def test_a_name_is_found_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(name) == CONFIGS / "estimator" / "backprop.yaml"


def test_a_file_of_the_users_own_comes_first_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    assert find("mnist") == CONFIGS / "mnist.yaml"
    (tmp_path / "mnist.yaml").touch()
    assert find("mnist.yaml") == Path("mnist.yaml")


def test_only_configurations_of_a_command_line_are_replaced() -> None:
    mnist = str(CONFIGS / "mnist.yaml")
    words = ["fit", "-c", "mnist", "--config=mnist", "--data", "mnist", "-c"]
    assert with_paths(words) == ["fit", "-c", mnist, f"--config={mnist}", "--data", "mnist", "-c"]


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(UserError, match=r"'estimator/backprp' is neither .* \(did you mean estimator/backprop\?\)"):
        find("estimator/backprp")


def test_configs_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names() and "mnist" in names()
    assert all(len(line.split()) > 2 for line in lines)  # a name and what it is for
    assert main(["configs", "mnist"]) == 0
    assert capsys.readouterr().out.strip() == (CONFIGS / "mnist.yaml").read_text().strip()
    assert main(["configs", "--copy", str(tmp_path / "mine"), "mnist", "optimizer/sgd"]) == 0
    copies = sorted(path.relative_to(tmp_path / "mine").as_posix() for path in (tmp_path / "mine").rglob("*.yaml"))
    assert copies == ["mnist.yaml", "optimizer/sgd.yaml"]
    assert yaml.safe_load((tmp_path / "mine" / "mnist.yaml").read_text())["trainer"]["max_epochs"] == 50
    assert main(["configs", "--copy", str(tmp_path / "mine"), "mnist"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_folder_at_the_top_is_a_link_into_the_package() -> None:
    link = CONFIGS.parents[1] / "configs"
    if not link.exists():
        pytest.skip("installed, not cloned")
    assert link.is_symlink() and link.readlink() == Path("zo_lightning/configs")
