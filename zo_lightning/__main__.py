"""``python -m zo_lightning`` and the console script ``zo-lightning``."""

import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def main(args: list[str] | None = None) -> int:
    """Run the command line ``args``, by default the process's own, and return its exit code."""
    words = sys.argv[1:] if args is None else args
    if words == ["--version"]:  # answered before anything heavy is imported
        print(f"zo-lightning {version()}")
        return 0
    from zo_lightning.commands import main as run

    return run(args)


def version() -> str:
    """The installed version, or that of ``setup.cfg`` where the package runs from its source."""
    try:
        return installed_version("zo-lightning")
    except PackageNotFoundError:
        from configparser import ConfigParser
        from pathlib import Path

        setup = ConfigParser()
        setup.read(Path(__file__).parent.parent / "setup.cfg")
        return setup.get("metadata", "version", fallback="unknown")


if __name__ == "__main__":
    sys.exit(main())
