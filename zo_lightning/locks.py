"""Files that one process at a time can hold."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from zo_lightning.user_errors import UserError


@contextlib.contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold a file's lock, which the system gives back however the process ends. Wait for it, or refuse.

    Raises:
        UserError: with the text ``refusal``, where another process holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError as error:
            raise UserError(refusal or "") from error
        yield
