"""Sliders for one impression in JupyterLab: teacher, class, beta, temperature, prior and steps, with a live figure.

    from zskd_nni.research.explorer.widget import Explorer

    Explorer()

Importing this module needs no ipywidgets; showing an explorer does (``pip install '.[notebooks]'``).
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zskd_nni.data.datasets import CLASS_NAMES
from zskd_nni.data.procedural import KINDS
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.models.zoo.trained import trained_names
from zskd_nni.research.explorer.figure import exploration_picture
from zskd_nni.research.explorer.one_impression import Answer, Question, explore_class, explore_one
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic
from zskd_nni.synthesis import Impressions
from zskd_nni.synthesis.image_grid import impressions_picture

PRIORS = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOST_STEPS = 300
FIRST = "lenet5-digits"  # of the shipped teachers: its first picture is there in seconds
_BUSY = '<span role="status">&#9203; making the impression ...</span>'


class Explorer:
    """Widgets that make a new impression whenever one of them is changed.

    Args:
        teachers: by name; by default the shipped ones, that of digits first.
        question: the first question.
        gallery_size: impressions of a class that *add to the gallery* makes.

    Attributes:
        question: the last question.
        answer: the impression that it gave.
        gallery: kept impressions by class, in the order they were added.

    Raises:
        UserError: ipywidgets is not installed, or no teacher was given.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher] | None = None, question: Question | None = None, gallery_size: int = 20
    ) -> None:
        if teachers is not None and not teachers:
            raise UserError("Explorer was given no teacher; leave teachers= out for the shipped ones.")
        self._widgets = _ipywidgets()
        self._loaded: dict[str, Teacher] = dict(teachers or {})
        names = list(teachers) if teachers else sorted(trained_names(), key=lambda name: name != FIRST)
        self.question = question or Question()
        self.question.settings()  # invalid values are reported before anything is drawn
        self.gallery_size = gallery_size
        self.gallery: dict[int, Impressions] = {}
        self.answer: Answer
        self._build(names)
        self._teacher_changed(None)

    @property
    def teacher(self) -> Teacher:
        """The selected teacher."""
        name = self._teacher.value
        if name not in self._loaded:
            self._loaded[name] = load_teacher(name)
        return self._loaded[name]

    @property
    def class_names(self) -> list[str] | None:
        """The names of the selected teacher's classes; None where they are numbers."""
        _, _, data = self._teacher.value.partition("-")
        names = CLASS_NAMES.get(data, ()) if self._teacher.value in trained_names() else ()
        return list(names) if len(names) == self.teacher.num_classes else None

    def keep(self) -> Impressions:
        """Make ``gallery_size`` impressions of the selected class, and keep them in the gallery."""
        made = explore_class(self.teacher, self.question, self.gallery_size)
        self.gallery[self.question.label] = made
        self._gallery.value = self._gallery_png()
        self._gallery.layout.display = ""
        return made

    def save_gallery(self, path: str | Path) -> None:
        """Draw the gallery into a ``.png`` file.

        Raises:
            UserError: the gallery is empty, or the file is no ``.png``.
        """
        if Path(path).suffix != ".png":
            raise UserError(f"A gallery is saved as .png, not as {path}.")
        write_atomic(path, self._gallery_png())

    def _ipython_display_(self) -> None:
        importlib.import_module("IPython.display").display(self.widget)

    def _build(self, names: list[str]) -> None:
        widgets, asked = self._widgets, self.question
        wide = {"style": {"description_width": "6.5em"}, "layout": widgets.Layout(width="98%")}
        live = {**wide, "continuous_update": False}  # a synthesis takes longer than a slider's next value
        # Every slider's range includes what is asked first, so that none changes the question.
        decade = math.floor(math.log10(asked.beta))
        betas = {"min": min(-2, decade), "max": max(1, decade + 1), "step": 0.05}
        temperatures = {"min": min(1, asked.temperature), "max": max(40, asked.temperature), "step": 0.5}
        priors = {"options": sorted({*PRIORS, asked.total_variation}), "value": asked.total_variation}
        self._teacher = widgets.Dropdown(options=names, description="teacher", **wide)
        self._controls: dict[str, Any] = {
            "label": widgets.IntSlider(asked.label, 0, max(1, asked.label), description="class", **live),
            "beta": widgets.FloatLogSlider(asked.beta, description="beta", **betas, **live),
            "temperature": widgets.FloatSlider(asked.temperature, description="temperature", **temperatures, **live),
            "total_variation": widgets.SelectionSlider(description="smoothness", **priors, **live),
            "steps": widgets.IntSlider(asked.steps, 1, max(MOST_STEPS, asked.steps), description="steps", **live),
            "start": widgets.Dropdown(options=KINDS, value=asked.start, description="start", **wide),
        }
        auto, full = widgets.Layout(width="auto"), {"width": "100%", "max_width": "1000px"}
        self._again = widgets.Button(description="another draw", icon="random", layout=auto)
        self._keep = widgets.Button(description="add to the gallery", icon="th", button_style="primary", layout=auto)
        self._class_name, self._note = widgets.HTML(), widgets.HTML()
        self._picture = widgets.Image(format="png", layout=widgets.Layout(**full))
        self._gallery = widgets.Image(format="png", layout=widgets.Layout(display="none", **full))
        self._teacher.observe(self._teacher_changed, "value")
        for control in self._controls.values():
            control.observe(self._control_changed, "value")
        self._again.on_click(lambda _: self._ask(replace(self.question, seed=self.question.seed + 1)))
        self._keep.on_click(lambda _: self._show_errors(self.keep))
        label, *others = self._controls.values()
        buttons = widgets.HBox([self._again, self._keep])
        controls = [self._teacher, label, self._class_name, *others, buttons, self._note]
        shown = widgets.VBox([self._picture, self._gallery], layout=widgets.Layout(flex="1 1 30em"))
        left = widgets.VBox(controls, layout=widgets.Layout(flex="0 1 25em"))
        self.widget = widgets.HBox([left, shown], layout=widgets.Layout(flex_flow="row wrap"))
        self.widget.add_class("zskd-explorer")

    def _teacher_changed(self, _: Any) -> None:
        last = self.teacher.num_classes - 1
        self.gallery.clear()
        self._gallery.layout.display = "none"
        label = self._controls["label"]
        with label.hold_trait_notifications():
            label.value = min(label.value, last)
            label.max = last
        self._ask(replace(self.question, label=label.value))

    def _control_changed(self, _: Any) -> None:
        question = replace(self.question, **{name: control.value for name, control in self._controls.items()})
        if question != self.question:
            self._ask(question)

    def _ask(self, question: Question) -> None:
        self.question = question
        names = self.class_names
        self._class_name.value = "" if names is None else f"class {question.label}: <b>{names[question.label]}</b>"
        self._show_errors(self._answer)

    def _answer(self) -> None:
        self.answer = explore_one(self.teacher, self.question)
        self._picture.value = exploration_picture(self.answer, self.teacher.spec, self.question.label, self.class_names)

    def _show_errors(self, action: Callable[[], Any]) -> None:
        """Say below the sliders that work goes on, and then a user's mistake: an exception in a callback is lost."""
        self._note.value = _BUSY
        try:
            action()
            self._note.value = ""
        except UserError as error:
            self._note.value = f"<b>{error}</b>"

    def _gallery_png(self) -> bytes:
        if not self.gallery:
            raise UserError("The gallery is empty; add a class to it first.")
        kept = list(self.gallery.values())
        buffer = io.BytesIO()
        names = self.class_names or [str(label) for label in range(self.teacher.num_classes)]
        impressions_picture(
            torch.cat([one.images for one in kept]),
            torch.cat([one.logits for one in kept]),
            self.teacher.spec,
            buffer,
            title=f"Gallery of {self._teacher.value}: asked for {', '.join(names[label] for label in self.gallery)}",
            names=self.class_names,
        )
        return buffer.getvalue()


def _ipywidgets() -> Any:
    try:
        return importlib.import_module("ipywidgets")
    except ModuleNotFoundError as error:
        raise UserError("The explorer needs ipywidgets: pip install '.[notebooks]'.") from error
