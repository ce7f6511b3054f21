"""The configurations that come with the package: found by their names, listed and copied."""

import shutil
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from zo_lightning.user_errors import CommandParser, UserError
from zo_lightning.words import OTHERS

CONFIGS = Path(__file__).with_name("configs")


def names() -> list[str]:
    """All configurations, such as ``"estimator/backprop"``; the general ones come first."""
    paths = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (path.parent != CONFIGS, path))
    return [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in paths]


def find(name: str) -> Path:
    """The file that a name stands for: that file itself, or a configuration of the package.

    ``estimator/backprop``, ``estimator/backprop.yaml`` and ``configs/estimator/backprop.yaml`` are the same one.

    Raises:
        UserError: there is neither.
    """
    own = Path(name)
    if own.exists() and not own.is_dir():  # a folder may be called mnist, and a pipe is no regular file
        return own
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in (known := names()):
        return CONFIGS / f"{short}.yaml"
    by_end = {preset.rpartition("/")[2]: preset for preset in reversed(known)}
    nearest = get_close_matches(short, known, n=1) or get_close_matches(short, by_end, n=1)
    hint = f" (did you mean {by_end.get(nearest[0], nearest[0])}?)" if nearest else ""
    raise UserError(f"'{name}' is neither a file nor a configuration of the package{hint}; see zo-lightning configs")


def with_paths(words: Sequence[str]) -> list[str]:
    """A command line whose ``-c`` and ``--config`` name files.

    Raises:
        UserError: one of them names nothing.
    """
    found = list(words)
    for place, word in enumerate(found):
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config"):
            continue
        if equals:
            found[place] = f"{option}={find(value)}"
        elif place + 1 < len(found):
            found[place + 1] = str(find(found[place + 1]))
    return found


def configs_command(words: list[str]) -> int:
    """Run the command line of ``configs``; return its exit code.

    Raises:
        UserError: a name is unknown, or a copy would overwrite a file.
    """
    parser = CommandParser(prog="zo-lightning configs", description=OTHERS["configs"].capitalize() + ".")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as mnist or estimator/backprop; default: all")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="write them there, to be changed and given to -c")
    options = parser.parse_args(words)
    files = [find(name) for name in options.names or names()]
    if options.copy is None:
        print(_texts(files) if options.names else "\n".join(map(_line, files)), flush=True)
        return 0
    copies = {file: options.copy / _relative(file) for file in files}
    for copy in copies.values():
        if copy.exists():
            raise UserError(f"--copy: '{copy}' exists already, and may have been changed: name another folder")
    for file, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    print(f"{len(copies)} files are in {options.copy}; to use one: -c {next(iter(copies.values()))}")
    return 0


def _relative(file: Path) -> Path:
    return file.relative_to(CONFIGS) if file.is_relative_to(CONFIGS) else Path(file.name)


def _line(file: Path) -> str:
    title = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f"{_relative(file).with_suffix('').as_posix():<28} {textwrap.shorten(title, 90, placeholder=' ...')}"


def _texts(files: list[Path]) -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
