"""Ways to apply a function to many things side by side: processes of this machine, a Dask scheduler, a Ray cluster."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, TypeVar, cast

from zo_lightning.user_errors import UserError

Backend = Literal["loky", "dask", "ray"]
T = TypeVar("T")
R = TypeVar("R")


class Parallel(Protocol):
    """Applies a function, which must pickle, to items side by side; yields results in the order in which they come."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Begin."""
        ...


@contextlib.contextmanager
def engine(backend: Backend, address: str | None, jobs: int, threads: int) -> Iterator[Parallel]:
    """A backend that is ready, with ``jobs`` workers of ``threads`` threads each.

    Args:
        backend: joblib's name of it.
        address: of a Dask scheduler or a Ray cluster, which then has its own workers; None starts a local one.
        jobs: items at a time.
        threads: of each worker, where the backend is loky.

    Raises:
        UserError: the backend cannot be used.
    """
    import joblib

    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"n_jobs": jobs}
        in_flight = "2 * n_jobs"
        if backend == "loky":
            # With one job joblib would work in this process, which a function that kills its own takes with it.
            settings["n_jobs"], in_flight = max(2, jobs), str(jobs)
            # One batch of threads per worker, or the workers fight for the cores.
            settings["inner_max_num_threads"] = threads
        elif backend == "dask":
            stack.enter_context(_dask_client(address, jobs))
            settings["n_jobs"] = -1
        else:
            _connect_ray(address, jobs)
            settings["n_jobs"] = -1
        stack.enter_context(joblib.parallel_config(backend=backend, **settings))
        unordered = "list" if backend == "ray" else "generator_unordered"

        def parallel(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
            # Its stub knows batch_size="auto" only.
            pool: Any = joblib.Parallel(return_as=unordered, batch_size=cast(Any, 1), pre_dispatch=in_flight)
            return pool(joblib.delayed(function)(item) for item in items)

        yield parallel


def worker_died() -> type[BaseException]:
    """The error of loky where a worker's process ends: all others are killed with it."""
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    return TerminatedWorkerError


@contextlib.contextmanager
def _dask_client(address: str | None, jobs: int) -> Iterator[Any]:
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise UserError("--backend dask needs the extra: pip install 'zo-lightning[dask]'") from error
    client: Any
    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    try:
        client = Client(address, timeout=10, set_as_default=True) if address else Client(**local)
    except (OSError, ValueError) as error:
        raise UserError(f"no Dask scheduler answers at '{address}': {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=60)
        except TimeoutError as error:
            raise UserError(f"the Dask scheduler at '{address}' has no workers") from error
        try:
            client.run(_answer)  # joblib waits forever for a worker that lacks the package
        except Exception as error:
            raise UserError(f"a Dask worker cannot import zo_lightning: {error}") from error
        crowded = [name for name, count in client.nthreads().items() if count > 1]
        if crowded:  # a run seeds the process's random numbers and writes to its standard output
            raise UserError(f"Dask worker '{crowded[0]}' has several threads: start workers with --nthreads 1")
        yield client


def _answer() -> None:
    pass


def _connect_ray(address: str | None, jobs: int) -> None:
    try:
        ray, bridge = import_module("ray"), import_module("ray.util.joblib")
    except ImportError as error:
        raise UserError("--backend ray needs the extra: pip install 'zo-lightning[ray]'") from error
    ray.init(address=address, num_cpus=None if address else jobs)
    bridge.register_ray()
