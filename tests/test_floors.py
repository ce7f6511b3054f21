"""Imports only go down: the package is a house whose floors know nothing of those above."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "zo_lightning"

# A module or subpackage imports from lower floors and from itself; nothing else of its own floor.
FLOORS = {
    "counter": -2,
    "noise": -1,
    "user_errors": -1,
    "counter_kernels": -3,
    "vectors": -1,
    "directions": 0,
    "centred": 1,
    "low_rank": 1,
    "stencils": 0,
    "shaping": 0,
    "costs": 0,
    "parameters": -2,
    "compiled": -2,
    "buffers": -1,
    "random_states": -1,
    "objective": 0,
    "black_box": 1,
    "distributed": 1,
    "optim": 0,
    "nets": 0,
    "data": 0,
    "snapshots": 0,
    "difference_steps": 0,
    "step_log": 0,
    "checkpoint_io": 0,
    "progress": 0,
    "curves": 0,
    "filters": 0,
    "trajectories": 0,
    "palette": 0,
    "allocator": 0,
    "perturbed": 1,
    "evaluation": 2,
    "estimators": 3,
    "ask_tell": 4,
    "measures": 4,
    "minimization": 4,
    "modules": 4,
    "cli_errors": 4,
    "cli_parser": 6,
    "locks": 0,
    "yaml_files": 0,
    "words": 1,
    "help_page": 2,
    "presets": 2,
    "checkpoints": 5,
    "replay": 5,
    "runs": 6,
    "callbacks": 6,
    "study": 6,
    "tuning": 7,
    "cli": 8,
    "commands": 9,
    "__main__": 10,
}
# The package's own __init__ names everything, lazily, so it may import anything; for the others it is the roof.
ROOF = "__init__"
MAY_IMPORT_ROOF = ("cli", "__main__")


def component(name: str, package: Path) -> str:
    """The part of the package that a dotted name, such as ``zo_lightning.optim.adamm.AdaMM``, belongs to."""
    part = f"{name}.".split(".")[1]
    is_module = (package / f"{part}.py").exists() or (package / part).is_dir()
    return part if part and is_module else ROOF


def imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """The line and the full name of all that a file imports, at its top, in functions and for type checkers alike."""
    home = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def violations(package: Path) -> list[str]:
    """What a package does against the floors, one sentence each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        source = inside.parts[0].removesuffix(".py")
        if source == ROOF:
            continue
        if source not in FLOORS:
            found.append(f"{inside}: '{source}' has no floor: add it to FLOORS in tests/test_floors.py")
            continue
        for line, name in imported(path, package):
            top = name.partition(".")[0]
            if top == "callbacks":
                found.append(f"{inside}:{line}: imports the link 'callbacks': import {package.name}.callbacks")
            if top != package.name:
                continue
            target = component(name, package)
            if target == ROOF:
                allowed = source in MAY_IMPORT_ROOF
            else:  # a target without a floor is reported by its own file
                allowed = target == source or FLOORS.get(target, -1) < FLOORS[source]
            if not allowed:
                found.append(f"{inside}:{line}: '{source}' imports '{name}', which is not on a lower floor")
    return found


def test_imports_only_go_down() -> None:
    assert not violations(PACKAGE)


def test_checker_sees_every_kind_of_violation(tmp_path: Path) -> None:
    """A checker that cannot fail proves nothing."""
    package = tmp_path / "zo_lightning"
    files = {
        "__init__.py": "from zo_lightning.estimators import Backprop\n",  # allowed
        "cli.py": "import zo_lightning as zo\nfrom zo_lightning import study\n",  # allowed
        "study/__init__.py": "from . import figures\nfrom ..modules import Classifier\n",  # allowed
        "study/figures.py": "import numpy as np\n",
        "modules/__init__.py": "def f():\n    from zo_lightning.cli import main\n",
        "estimators/__init__.py": "from zo_lightning import Backprop\n",
        "estimators/base.py": "from ..modules import Classifier\n",
        "evaluation.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zo_lightning.study.figures\n",
        "nets.py": "from zo_lightning import optim\n",
        "optim/__init__.py": "from callbacks import Timer\n",
        "attic.py": "",
    }
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert [violation.split(": ")[0] for violation in violations(package)] == [
        "attic.py",
        "estimators/__init__.py:1",
        "estimators/base.py:1",
        "evaluation.py:3",
        "modules/__init__.py:2",
        "nets.py:1",
        "optim/__init__.py:1",
    ]
