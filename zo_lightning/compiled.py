"""Beside ``torch.compile``: code that has to be watched runs as it was written, and the watchers are not compiled."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def as_written() -> AbstractContextManager[Any]:
    """A context, to be entered at once, in which what ``torch.compile`` has made runs as it was written.

    In all threads of the process; where PyTorch's compiler has not been loaded, there is nothing to do.
    """
    return torch.compiler.set_stance("force_eager") if _is_loaded() else nullcontext()


def untraced(function: F) -> F:
    """The function, which a compiled caller calls as it is: ``torch.compiler.disable``, but loads no compiler."""
    apart: Any = torch._disable_dynamo(function)

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (apart if _is_loaded() else function)(*args, **kwargs)

    return cast(F, called)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, or one within it, is compiled, by ``torch.compile`` or by its own ``compile``."""
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in module.modules())


def _is_loaded() -> bool:
    return "torch._dynamo" in sys.modules
