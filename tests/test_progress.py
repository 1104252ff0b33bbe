"""Progress is never silent for long, and each step of a run is announced."""

from __future__ import annotations

import sys
import time

import pytest

from zskd_nni.pipeline.steps import headings
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime import progress
from zskd_nni.runtime.progress import Progress, stage


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LONGEST_SILENCE", 0.05)
    monkeypatch.setattr(progress, "_LOOKS_EVERY", 0.01)


def said_within(capsys: pytest.CaptureFixture[str], words: str, seconds: float = 20.0) -> str:
    """What was said until ``words`` were."""
    said, end = "", time.monotonic() + seconds
    while words not in said:
        assert time.monotonic() < end, f"{words!r} was not said: {said!r}"
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said


def test_a_stage_that_says_nothing_gives_signs_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("step 2 of 6: pruning the student"):
        said = said_within(capsys, "so far")
    assert said.splitlines()[:2] == ["step 2 of 6: pruning the student", "  at work: 0 s so far"]
    assert not progress._voice.stages and progress._voice._thread is None


def test_work_that_is_short_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LONGEST_SILENCE", 3600.0)
    monkeypatch.setattr(progress._voice, "_spoken", time.monotonic() - 7200)  # before the stage nothing was at work
    with stage("compress", told=False):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_work_that_hangs_is_shown_with_its_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("compress", told=False), Progress("distillation", 100, "steps", done=10) as shown:
        assert "distillation: 10/100 steps, " in said_within(capsys, "so far")
        shown.advance(30, "loss 0.5")
        said = said_within(capsys, "left, loss 0.5")
        assert "distillation: 40/100 steps, " in said and "/s, " in said
    assert "distillation: 30 more steps in " in capsys.readouterr().err


def test_a_line_beside_a_bar_begins_at_the_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LONGEST_SILENCE", 3600.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("distillation", 100, "steps"):
        progress.say("the teacher is right")
    assert "\rthe teacher is right\n" in capsys.readouterr().err


def test_a_quiet_stage_and_quiet_progress_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("compress", quiet=True), Progress("distillation", 100, "steps", quiet=True) as shown:
        time.sleep(0.2)
        shown.advance(1)
    assert capsys.readouterr().err == ""


def test_a_stage_that_fails_ends_as_well() -> None:
    with pytest.raises(ValueError, match="no"), stage("compress"):
        raise ValueError("no")
    assert not progress._voice.stages and progress._voice._thread is None


def test_steps_are_numbered_and_controls_are_among_them() -> None:
    steps = headings(load_recipe("digits-prune50").recipe)
    assert list(steps.values()) == [
        "step 1 of 12: held-out images",
        "step 2 of 12: images to train on",
        "step 3 of 12: pruning the student",
        "step 4 of 12: distilling the student",
        "step 5 of 12: quantizing the student",
        "step 6 of 12: pruning the control without distillation",
        "step 7 of 12: quantizing the control without distillation",
        "step 8 of 12: pruning the control on noise",
        "step 9 of 12: distilling the control on noise",
        "step 10 of 12: quantizing the control on noise",
        "step 11 of 12: exporting the student",
        "step 12 of 12: measuring all networks",
    ]
    given = headings(load_recipe("digits-prune50").recipe, given=True)
    assert len(given) == 11 and "transfer set" not in given
