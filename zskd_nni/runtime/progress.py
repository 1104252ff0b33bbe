"""Progress of long work: a bar on a terminal, plain lines elsewhere, and a sign of life every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

LONGEST_SILENCE = 4.0  # seconds
_LOOKS_EVERY = 0.25  # seconds


class _Voice:
    """What this process says on standard error: the stages that are at work, innermost last, and their progress.

    While a stage is at work, a thread says that it goes on wherever nothing else was said for a while.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stages: list[tuple[str, float, bool]] = []  # name, when it began, whether its name was told
        self.progress: list[Progress] = []
        self._spoken = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        with self.lock:
            self._spoken = time.monotonic()
            under_a_name = any(told for _, _, told in self.stages)
            _print(f"  {text}" if under_a_name else text)

    def is_due(self) -> bool:
        return time.monotonic() - self._spoken >= LONGEST_SILENCE

    def begin(self, name: str, told: bool) -> None:
        with self.lock:
            if told or not self.stages:
                self._spoken = time.monotonic()
            if told:
                _print(name)
            self.stages.append((name, time.monotonic(), told))
            if self._thread is None:
                self._stop.clear()
                self._thread = threading.Thread(target=self._watch, name="signs of life", daemon=True)
                self._thread.start()

    def end(self) -> None:
        with self.lock:
            self.stages.pop()
            thread = self._thread if not self.stages else None
        if thread is not None:
            self._stop.set()
            thread.join()
            self._thread = None

    def _watch(self) -> None:
        while not self._stop.wait(_LOOKS_EVERY):
            with self.lock:
                if self.stages and self.is_due():
                    self._sign_of_life()

    def _sign_of_life(self) -> None:
        shown = [progress for progress in self.progress if not progress.quiet]
        if shown:
            self._spoken = time.monotonic()
            shown[-1].show()
        else:
            name, began, told = self.stages[-1]
            self.say(f"{'at work' if told else name}: {span(time.monotonic() - began)} so far")


def _print(line: str) -> None:
    """A line of its own on standard error; a bar that is shown goes on below it."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(line, file=sys.stderr, flush=True)


_voice = _Voice()


@contextmanager
def stage(name: str, quiet: bool = False, told: bool = True) -> Iterator[None]:
    """Name the work within the block. Something is said about it at least every five seconds.

    Args:
        name: such as ``step 2 of 6: pruning the student``.
        quiet: say nothing.
        told: say the name at once; otherwise only if the work takes longer.
    """
    if quiet:
        yield
        return
    _voice.begin(name, told)
    try:
        yield
    finally:
        _voice.end()


def say(sentence: str) -> None:
    """Print on standard error, below the name of the stage that is at work."""
    _voice.say(sentence)


class Progress:
    """Counts ``unit``s towards ``total`` and shows rate and time left on standard error.

    Args:
        label: what is being done.
        total: how many units there are.
        unit: their name, plural.
        done: how many an earlier, interrupted run finished.
        quiet: show nothing.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.done, self.quiet = label, total, unit, done, quiet
        self._first, self._started, self._note = done, time.monotonic(), ""
        self._bar: tqdm | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", initial=done, dynamic_ncols=True, leave=True)

    def advance(self, count: int, note: str = "") -> None:
        """Add ``count`` finished units; ``note`` is a short figure shown beside them."""
        self.done, self._note = self.done + count, note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif not self.quiet and _voice.is_due():
            self.show()

    def show(self) -> None:
        """Show how far it is."""
        if self._bar is not None:
            self._bar.refresh()
            return
        seconds, finished = time.monotonic() - self._started, self.done - self._first
        parts = [f"{self.label}: {self.done:,}/{self.total:,} {self.unit}"]
        if finished > 0:
            rate = finished / max(seconds, 1e-9)
            parts += [speed(rate), f"{span((self.total - self.done) / rate)} left"]
        else:
            parts.append(f"{span(seconds)} so far")
        _voice.say(", ".join([*parts, self._note] if self._note else parts))

    def __enter__(self) -> Progress:
        with _voice.lock:
            _voice.progress.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _voice.lock:
            _voice.progress.remove(self)
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and kind is None and self.done > self._first:
            count = f"{self.done - self._first:,} {'more ' if self._first else ''}{self.unit}"
            _voice.say(f"{self.label}: {count} in {time.monotonic() - self._started:.1f} s")


def speed(rate: float) -> str:
    """A rate a second in words; the time of one unit where it takes longer than a second.

    Example:
        >>> speed(152.3), speed(2.345), speed(0.25)
        ('152/s', '2.3/s', '4.0 s each')
    """
    if rate >= 10:
        return f"{rate:,.0f}/s"
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"


def span(seconds: float) -> str:
    """A time in words.

    Example:
        >>> span(7.2), span(1000), span(20000)
        ('7 s', '17 min', '5.6 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
