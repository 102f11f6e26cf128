"""Worker processes on one machine: one that is killed doesn't stop the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from moa_search.errors import ConfigError, MoAError

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0
"""How long a worker that was told to stop has for putting its trial back."""


def run_workers(
    count: int,
    target: Callable[..., None],
    arguments: Sequence[Any] = (),
    devices: Sequence[str] = (),
    *,
    watch: Callable[[], None] | None = None,
) -> list[str]:
    """Run ``target(index, device, *arguments)`` in ``count`` processes of their own and wait for all.

    The processes are spawned, so ``target`` is a function of a module and the arguments can be pickled.

    Args:
        count: Processes.
        target: What each runs.
        arguments: Passed to each.
        devices: Given to the workers in turn; None is passed where there are none.
        watch: Called in this process every half second and whenever a worker has ended.

    Returns:
        What went wrong, a line for each worker that didn't end by itself.

    Raises:
        ConfigError: The count isn't positive.
        KeyboardInterrupt: After the workers were stopped the same way.
    """
    if count < 1:
        raise ConfigError(f"{count} workers can't do anything; give at least 1")
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    try:
        for index in range(count):
            device = devices[index % len(devices)] if devices else None
            processes.append(context.Process(target=_main, args=(target, index, device, tuple(arguments)), daemon=True))
            processes[-1].start()
        while running := [process.sentinel for process in processes if process.is_alive()]:
            connection.wait(running, timeout=POLL_SECONDS)
            if watch is not None:
                watch()
    except BaseException:
        _stop(processes)
        raise
    return [line for index, process in enumerate(processes) if (line := _fate(index, process.exitcode))]


def _main(target: Callable[..., None], index: int, device: str | None, arguments: tuple[Any, ...]) -> None:
    def interrupt(*_: object) -> None:
        # A terminal interrupts every process, and so does the first one: once is enough.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def end_with(parent: BaseProcess) -> None:
        parent.join()  # it was killed: otherwise it waits for its workers
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    parent = multiprocessing.parent_process()
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        target(index, device, *arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except MoAError as error:
        print(f"worker {index}: {error}", file=sys.stderr)
        sys.exit(2)


def _stop(processes: list[BaseProcess]) -> None:
    """Interrupt the workers, and kill those that don't end in time."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _fate(index: int, code: int | None) -> str | None:
    if code is None or code == 0:
        return None
    if code < 0:
        return f"worker {index} was killed by {signal.Signals(-code).name}"
    return f"worker {index} ended with an error"
