"""What a fresh clone holds, and what it installs."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import zo_lightning as zo
from zo_lightning.__main__ import version as zo_lightning_version

ROOT = Path(__file__).resolve().parents[1]
CONFIG = configparser.RawConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
VERSION = CONFIG["metadata"]["version"]
# Without what the caller's environment could add to the import path.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks, or would: nothing built and nothing installed lies between them."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("git lists the files of a fresh clone, and this is no git checkout")
    copy = tmp_path_factory.mktemp("clone")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):  # not if deleted, and not yet committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(clone, folder / "source", symlinks=True)  # a build leaves its traces
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), ".", cwd=source)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_the_package_and_nothing_else(clone: Path, wheel: zipfile.ZipFile) -> None:
    """All of ``zo_lightning``, data files too; no top-level ``callbacks``, no tests."""
    package = {str(path.relative_to(clone)) for path in (clone / "zo_lightning").rglob("*") if path.is_file()}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert "zo_lightning/py.typed" in held
    assert held == package, "missing from the wheel: a file kind that [options.package_data] in setup.cfg lacks?"


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    about = f"zo_lightning-{VERSION}.dist-info"
    metadata = wheel.read(f"{about}/METADATA").decode()
    assert f"\nVersion: {VERSION}\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert f"{about}/licenses/LICENSE" in wheel.namelist()


def test_console_script_exists(wheel: zipfile.ZipFile) -> None:
    scripts = configparser.RawConfigParser()
    scripts.read_string(wheel.read(f"zo_lightning-{VERSION}.dist-info/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"zo-lightning": "zo_lightning.__main__:main"}
    main = ast.parse(wheel.read("zo_lightning/__main__.py"))
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in main.body)


def test_callbacks_is_a_link_into_the_package() -> None:
    link = ROOT / "callbacks"
    assert link.is_symlink()
    assert link.readlink() == Path("zo_lightning/callbacks")


def test_version_without_installing_anything(clone: Path) -> None:
    """``-S`` hides all installed packages: the version is answered before torch or Lightning is imported."""
    assert VERSION in run(sys.executable, "-S", "-m", "zo_lightning", "--version", cwd=clone)


def test_version_of_the_package() -> None:
    assert zo.__version__ == zo_lightning_version()


def test_type_checkers_see_misspelt_names() -> None:
    """A module with ``__getattr__`` has every name, to them: it must not be there when they look."""
    body = ast.parse((ROOT / "zo_lightning" / "__init__.py").read_text(encoding="utf-8")).body
    hidden = [node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "not TYPE_CHECKING"]
    names = [[one.name for one in where if isinstance(one, ast.FunctionDef)] for where in (body, hidden[0].body)]
    assert "__getattr__" not in names[0] and names[1] == ["__getattr__"]
    with pytest.raises(AttributeError, match="no attribute 'ZerothOrdr'"):
        getattr(zo, "Zeroth" + "Ordr")


def test_version_stands_in_setup_cfg_only() -> None:
    mentions = [
        path.name for path in (ROOT / "zo_lightning").rglob("*.py") if f'"{VERSION}"' in path.read_text("utf-8")
    ]
    assert not mentions
