"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


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
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._first, self._started, self._printed = done, time.monotonic(), time.monotonic()
        self._bar: tqdm | None = None
        self._lines = not quiet and not sys.stderr.isatty()
        if not quiet and not self._lines:
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", initial=done, dynamic_ncols=True, leave=True)

    def advance(self, count: int, note: str = "") -> None:
        """Add ``count`` finished units; ``note`` is a short figure shown beside them."""
        self.done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print(note)

    def _print(self, note: str) -> None:
        self._printed = time.monotonic()
        rate = (self.done - self._first) / max(self._printed - self._started, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        text = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, {left:,.0f} s left"
        print(text + (f", {note}" if note else ""), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and kind is None and self.done > self._first:
            seconds = time.monotonic() - self._started
            print(f"{self.label}: {self.done:,} {self.unit} in {seconds:.1f} s", file=sys.stderr, flush=True)
