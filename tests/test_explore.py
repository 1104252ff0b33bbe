"""The explorer's impressions, and its widgets without a browser."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import small_teacher

from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.teacher import load_teacher
from zskd_nni.research.explorer.figure import exploration_picture
from zskd_nni.research.explorer.one_impression import Question, explore_class, explore_one
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import SynthesisSettings, synthesize

ASKED = Question(label=2, beta=0.3, temperature=2.0, total_variation=1e-3, steps=12)


def test_an_answer_is_what_the_teacher_says_to_the_images() -> None:
    teacher = small_teacher()
    answer = explore_one(teacher, ASKED)
    assert answer.steps[0] == 0
    assert answer.steps[-1] == 12
    assert answer.steps == sorted(set(answer.steps))
    logits = teacher.predict(answer.images)
    assert torch.allclose(answer.seen, torch.softmax(logits, 1), atol=1e-5)
    assert torch.allclose(answer.fitted, torch.softmax(logits / 2.0, 1), atol=1e-5)
    divergence = (answer.target * (answer.target.clamp_min(1e-30).log() - answer.fitted.log())).sum(1)
    assert torch.allclose(answer.fit, divergence, atol=1e-4)
    assert answer.fit[-1] < answer.fit[0]


def test_the_last_glimpse_is_the_impression_that_the_engine_makes_at_once() -> None:
    teacher = small_teacher()
    every, last = explore_one(teacher, ASKED), explore_one(teacher, ASKED, glimpses=2)
    assert last.steps == [0, 12]
    assert torch.allclose(every.images[-1], last.images[-1], atol=1e-5)
    assert torch.equal(every.target, last.target)
    assert torch.equal(explore_one(teacher, ASKED).images, every.images)
    assert not torch.equal(explore_one(teacher, dataclasses.replace(ASKED, seed=1)).images[0], every.images[0])


def test_likeness_and_target_are_zskds() -> None:
    teacher = small_teacher()
    targets = ZskdTargets(teacher, ZskdSettings(betas=(0.3,)))
    answer = explore_one(teacher, ASKED)
    assert torch.equal(answer.similarity, targets.similarity)
    drawn = torch.stack(
        [explore_one(teacher, dataclasses.replace(ASKED, seed=seed, steps=1)).target for seed in range(300)]
    )
    expected = answer.concentration / answer.concentration.sum()
    assert torch.allclose(drawn.mean(0), expected, atol=0.08)
    assert torch.allclose(answer.target.sum(), torch.tensor(1.0))


def test_a_class_agrees_with_a_store_of_the_same_settings(tmp_path: Path) -> None:
    teacher = small_teacher()
    made = explore_class(teacher, ASKED, 40)
    settings = SynthesisSettings(temperature=2.0, max_steps=12, total_variation=(1e-3, 1e-3))
    store = synthesize(
        teacher,
        ZskdTargets(teacher, ZskdSettings(betas=(0.3,))),
        settings,
        size=200,
        seed=5,
        folder=tmp_path,
        quiet=True,
    )
    assert len(made) == 40
    assert set(made.steps.tolist()) == {12}
    of_class = store.read(0).fit[2::5]
    assert made.fit.mean() == pytest.approx(float(of_class.mean()), rel=0.35)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 5}, "classes 0 to 4, not 5"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"steps": 0}, "max_steps must be at least 1"),
        ({"start": "nose"}, "start is one of"),
        ({"total_variation": -1.0}, "total_variation"),
    ],
)
def test_what_cannot_be_asked_is_said(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        explore_one(small_teacher(), dataclasses.replace(ASKED, **change))


def test_one_step_and_held_backgrounds() -> None:
    teacher = small_teacher()
    assert explore_one(teacher, dataclasses.replace(ASKED, steps=1)).steps == [0, 1]
    shaped = explore_one(teacher, dataclasses.replace(ASKED, start="shapes", seed=3))
    assert torch.isfinite(shaped.images).all()


def test_the_picture_is_a_png_that_shows_the_class() -> None:
    teacher = small_teacher()
    answer = explore_one(teacher, ASKED)
    drawn = exploration_picture(answer, teacher.spec, 2)
    assert drawn.startswith(b"\x89PNG")
    assert drawn != exploration_picture(answer, teacher.spec, 3)
    with pytest.raises(UserError, match="No trained weights 'lenet6'"):
        load_teacher("lenet6")


def test_without_ipywidgets_importing_works_and_showing_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ipywidgets'] = None\n"
        "from zskd_nni.research.explorer.widget import Explorer\n"
        "try: Explorer()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print('matplotlib' in sys.modules, 'nni' in sys.modules, 'IPython' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == [
        "UserError The explorer needs ipywidgets: pip install '.[notebooks]'.",
        "False False False",
    ], run.stderr


def test_digits_are_shown_first_classes_by_name_and_work_is_announced() -> None:
    pytest.importorskip("ipywidgets", reason="the extra notebooks is not installed")
    from zskd_nni.research.explorer.widget import Explorer

    started = time.process_time()
    explorer = Explorer()
    assert bytes(explorer._picture.value).startswith(b"\x89PNG")
    # Seconds of all cores: in a busy machine's clock it would fail, on two quiet cores the clock shows less.
    assert time.process_time() - started < 5
    assert explorer._teacher.value == "lenet5-digits"
    assert explorer.class_names is None and explorer._class_name.value == "", "digits are their numbers"
    explorer._teacher.value = "lenet5-fashion-mnist"
    assert "T-shirt" in explorer._class_name.value
    explorer._controls["label"].value = 9
    assert "boot" in explorer._class_name.value
    said = []
    explorer._note.observe(lambda change: said.append(change["new"]), "value")
    explorer._again.click()
    assert len(said) == 2 and "making the impression" in said[0] and said[1] == ""


def test_sliders_ask_and_the_gallery_keeps(tmp_path: Path) -> None:
    pytest.importorskip("ipywidgets", reason="the extra notebooks is not installed")
    from zskd_nni.research.explorer.widget import Explorer

    with pytest.raises(UserError, match="no teacher"):
        Explorer({})
    explorer = Explorer({"small": small_teacher(), "other": small_teacher(1, classes=3)}, ASKED, gallery_size=6)
    before, first = explorer._picture.value, explorer.answer
    explorer._controls["steps"].value = 3
    assert explorer.question == dataclasses.replace(ASKED, steps=3)
    assert explorer.answer.steps[-1] == 3
    assert explorer._picture.value != before
    assert torch.equal(explorer.answer.target, first.target)
    explorer._again.click()
    assert explorer.question.seed == 1
    assert not torch.equal(explorer.answer.target, first.target)

    with pytest.raises(UserError, match="gallery is empty"):
        explorer.save_gallery(tmp_path / "gallery.png")
    explorer._keep.click()
    explorer._controls["label"].value = 4
    assert len(explorer.keep()) == 6
    assert list(explorer.gallery) == [2, 4]
    explorer.save_gallery(tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").read_bytes() == explorer._gallery.value
    with pytest.raises(UserError, match=r"saved as \.png"):
        explorer.save_gallery(tmp_path / "gallery.jpg")

    explorer._teacher.value = "other"  # of three classes
    assert explorer.question.label == 2
    assert explorer._controls["label"].max == 2
    assert explorer.gallery == {}
    assert len(explorer.answer.target) == 3


def test_sliders_reach_what_is_asked() -> None:
    pytest.importorskip("ipywidgets", reason="the extra notebooks is not installed")
    from zskd_nni.research.explorer.widget import Explorer

    for far in (Question(temperature=60.0, beta=0.005, steps=3), Question(temperature=0.5, beta=20.0, steps=3)):
        explorer = Explorer({"small": small_teacher()}, far)
        explorer._controls["steps"].value = 2
        assert explorer.question.temperature == far.temperature
        assert explorer.question.beta == pytest.approx(far.beta)
    with pytest.raises(UserError, match="start is one of"):
        Explorer({"small": small_teacher()}, Question(start="nose"))


def test_what_goes_wrong_under_a_slider_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipywidgets", reason="the extra notebooks is not installed")
    from zskd_nni.research.explorer.widget import Explorer

    teacher = small_teacher()
    explorer = Explorer({"small": teacher}, ASKED)
    with torch.no_grad():
        teacher.model.head.weight.fill_(float("nan"))
    explorer._controls["steps"].value = 5
    assert "diverged" in explorer._note.value
