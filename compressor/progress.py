"""What is seen of work while it goes on: bars with rates on a terminal, and a log of what began and ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .measure import peak_memory_mb

Log = Callable[[dict[str, Any]], None]
_Item = TypeVar("_Item")


class Watch:
    """`with watch(title, total) as advance:`, nested as the work is; `advance(n)` says that n more are done.

    console: a rich console, whose bars show on a terminal only; None for none. log: is given
    {"event": "begin", "what", "depth", "total"} and {"event": "end", "what", "depth", "status", "seconds", "peak_mb",
    "count", "rate"}: seconds it took, largest memory of the process so far in MB (2**20 bytes), how many were done, and
    how many a second. status: `done`, or `failed`.
    """

    def __init__(self, console: Any = None, log: Log | None = None) -> None:
        self.log, self.depth = log, 0
        self._bar = _bars(console)

    @contextmanager
    def __call__(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        if self._bar is None and self.log is None:
            yield lambda n: None
            return
        count, start, status = 0, time.perf_counter(), "failed"
        self.say("begin", what=title, depth=self.depth, total=total)
        if self._bar is not None and not self._bar.tasks:
            self._bar.start()
        task = self._bar.add_task(title, total=total) if self._bar is not None else None
        self.depth += 1

        def advance(n: int) -> None:
            nonlocal count
            count += n
            if self._bar is not None:
                self._bar.advance(task, n)

        try:
            yield advance
            status = "done"
        finally:
            self.depth -= 1
            seconds = time.perf_counter() - start
            done = {"count": count, "rate": count / max(seconds, 1e-9)} if count else {}
            ended = {"status": status, "seconds": seconds, "peak_mb": peak_memory_mb(), **done}
            if self._bar is not None:
                self._bar.remove_task(task)
                if not self._bar.tasks:
                    self._bar.stop()
            self.say("end", what=title, depth=self.depth, **ended)

    def say(self, event: str, **facts: Any) -> None:
        """Hands an event to the log, if there is one."""
        if self.log is not None:
            self.log({"event": event, **facts})


def counted(
    items: Iterable[_Item], advance: Callable[[int], None], size: Callable[[_Item], int]
) -> Iterator[_Item]:
    """The items, each counted by its size once it was worked on."""
    for item in items:
        yield item
        advance(size(item))


def _bars(console: Any) -> Any:
    """rich's bars on a terminal; None elsewhere."""
    if console is None or not console.is_terminal or console.quiet:
        return None
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), rate)

    class Rated(Progress):
        """Bars that say how many are done, and how many a second."""

        def get_renderables(self) -> Any:
            for task in self.tasks:
                task.fields["rate"] = rated(task.completed, task.total, task.speed)
            return super().get_renderables()

        def add_task(self, description: str, *args: Any, **fields: Any) -> Any:
            return super().add_task(description, *args, rate="", **fields)

    return Rated(*columns, console=console, transient=True)


def rated(completed: float, total: float | None, speed: float | None) -> str:
    """`40/64  12.5/s`; empty where nothing is counted."""
    if not total:
        return ""
    return f"{completed:.0f}/{total:.0f}" + (f"  {speed:.3g}/s" if speed else "")
