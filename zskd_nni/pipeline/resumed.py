"""What a run finds in its folder, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import ImpressionStore

_STORES = {"impressions": "impressions", "impressions-held-out": "held-out impressions"}


def taken_up(out: Path, seconds: Mapping[str, float]) -> Iterator[str]:
    """One line for each step that an earlier call has finished or begun.

    Args:
        out: the run's folder.
        seconds: of earlier calls, by stage.
    """
    spent = sum(seconds.values())
    yield f"{out} is continued" + (f"; {spent:,.0f} s of work are in it" if spent >= 1 else "")
    for folder, what in _STORES.items():
        if (there := _finished(out / folder)) is not None:
            yield f"  {what}: {there}"
    state = out / "state"
    for path in sorted(state.glob("*.json")):
        if path.with_suffix(".safetensors").exists():
            yield f"  {path.stem}: finished, taken from {path}"
    for path in sorted(state.glob("*.checkpoint.pt")):
        yield f"  {path.name.removesuffix('.checkpoint.pt')}: begun, continued from its checkpoint"


def _finished(folder: Path) -> str | None:
    """How much of a store is there; None without one."""
    if not (folder / "manifest.json").exists():
        return None
    try:
        store: Any = ImpressionStore.open(folder)
        missing = set(store.missing())
    except UserError:  # it is refused where it is used
        return None
    there = sum(size for index, size in enumerate(store.shard_sizes) if index not in missing)
    return f"all {len(store):,} are there" if not missing else f"{there:,} of {len(store):,} are there"
