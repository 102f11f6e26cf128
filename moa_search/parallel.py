"""Several processes that share the samples, as ``torchrun`` starts them: one per GPU, on one machine or many.

Only results travel, as Python objects through gloo; models and gradients stay where they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moa_search.errors import ConfigError, MoAError

T = TypeVar("T")
R = TypeVar("R")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher such as ``torchrun`` sets."""


@dataclass(frozen=True)
class Workers:
    """This process among those that work on one job.

    Attributes:
        rank: Number of this process; 0 is the first, which writes files and prints.
        count: Processes in all.
        local_rank: Number of this process on its own machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def everywhere(self, mine: T) -> list[T]:
        """What every process passed, in order of rank, on every process."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        parts: list[T | None] = [None] * self.count
        dist.all_gather_object(parts, mine)
        return parts  # type: ignore[return-value]

    def on_first(self, mine: T) -> list[T]:
        """What every process passed, in order of rank; empty on all but the first."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        parts: list[T | None] = [None] * self.count
        dist.gather_object(mine, parts if self.is_first else None, dst=0)
        return parts if self.is_first else []  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """What the first process passed, on every process."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(self, work: Callable[[], R]) -> R:
        """Run ``work`` on every process; an error of one is raised on all, so that none waits for it.

        Raises:
            MoAError: What ``work`` raised on the first process where it did.
        """
        result: list[R] = []
        error: MoAError | None = None
        try:
            result.append(work())
        except MoAError as raised:
            error = raised
        failed = next((e for e in self.everywhere(error) if e is not None), None)
        if failed is not None:
            raise failed
        return result[0]

    def by_first(self, work: Callable[[], R]) -> R | None:
        """Run ``work`` on the first process alone; its result there, its error on all.

        Raises:
            MoAError: What ``work`` raised.
        """
        return self.together(lambda: work() if self.is_first else None)

    def rounds(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """``items`` in rounds of one per process; the last may be short."""
        for start in range(0, len(items), self.count):
            yield items[start : start + self.count]

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of ``items``: every ``count``-th one, from number ``rank`` on."""
        return items[self.rank :: self.count]


ALONE = Workers()
"""One process."""


@contextlib.contextmanager
def joined() -> Iterator[Workers]:
    """The processes that ``torchrun`` started, or `ALONE`; leaves the group at the end if it made it.

    Raises:
        ConfigError: The processes can't find each other.
    """
    if any(name not in os.environ for name in LAUNCHED) or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        try:
            dist.init_process_group("gloo")
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"the processes of this job can't find each other: {error}") from error
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if own:
            dist.destroy_process_group()
