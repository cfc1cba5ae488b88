"""What a long run says: progress bars on a terminal, plain lines otherwise. Everything goes to stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
import rich.progress


class Console:
    """Says what is going on. `quiet=True` says nothing (for tests and for use as a library)."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._rich = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self.bars = not quiet and self._rich.is_terminal
        self._started = time.monotonic()

    def line(self, text: str) -> None:
        """One line, with the time since the run began."""
        if not self.quiet:
            elapsed = int(time.monotonic() - self._started)
            print(f"[{elapsed // 60:d}:{elapsed % 60:02d}] {text}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator["Progress"]:
        """A bar of `total` units on a terminal; else a line now and then."""
        if not self.bars:
            yield Progress(self, title, total)
            return
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=self._rich,
            transient=True,
        ) as bar:
            yield Progress(self, title, total, bar)


class Progress:
    """Counts units of work; `note` is what to show beside the count."""

    def __init__(self, console: Console, title: str, total: int, bar: rich.progress.Progress | None = None):
        self._console = console
        self._title = title
        self._total = total
        self._bar = bar
        self._task = bar.add_task(title, total=total, note="") if bar else None
        self._said = time.monotonic()
        self._first: tuple[float, int] | None = None

    def at(self, done: int, note: str = "") -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if self._first is None:  # the first unit takes much longer: graphs are traced
            self._first = now, done
        if now - self._said >= 30 and done > self._first[1]:
            self._said = now
            left = (now - self._first[0]) / (done - self._first[1]) * (self._total - done)
            self._console.line(f"  {self._title}: {done} of {self._total}, about {left / 60:.1f} min left  {note}")
