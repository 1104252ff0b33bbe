"""A tuner with a memory, around any of NNI's: a search that was stopped goes on with what it knew.

NNI's own ``resume`` tells its tuner of finished trials only, counts what was cancelled as done, starts the tuner's
random numbers from the beginning, and may take a trial for another. So each start of a search is a new NNI experiment,
whose tuner is told first what is known, and proposes first what was proposed and never finished.

This file is copied beside the experiment and loaded by NNI's dispatcher process, which has ten seconds to start: it
imports nothing but NNI.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from nni.tools.package_utils.tuner_factory import create_builtin_class_instance, create_customized_class_instance
from nni.tuner import Tuner

_TRIES = 20


class RememberingTuner(Tuner):
    """Passes everything on to the tuner it holds.

    Args:
        tuner: NNI's mapping of it.
        known: finished trials, ``{"parameter": ..., "value": ...}``.
        again: parameters to propose first.
        proposed: file to which every proposal is added, one JSON mapping a line.
    """

    def __init__(
        self, tuner: dict[str, Any], known: list[dict[str, Any]], again: list[dict[str, Any]], proposed: str
    ) -> None:
        if "className" in tuner:
            self.inner = create_customized_class_instance(tuner)
        else:
            self.inner = create_builtin_class_instance(tuner["name"], tuner.get("classArgs"), "tuners")
        self.known, self.again, self.begun, self.proposed = known, list(again), list(again), proposed
        self.ours: dict[int, dict[str, Any]] = {}

    def update_search_space(self, search_space: dict[str, Any]) -> None:
        """The space comes first, then what is known in it."""
        self.inner.update_search_space(search_space)
        if self.known:
            self.inner.import_data(self.known)
            self.known = []

    def generate_multiple_parameters(self, parameter_id_list: list[int], **kwargs: Any) -> list[dict[str, Any]]:
        """What was begun before, then what the tuner proposes; fewer where it has no more."""
        ids, first = list(parameter_id_list), []
        while ids and self.again:
            self.ours[ids[0]] = self.again.pop(0)
            first.append(self.ours[ids.pop(0)])
        if "st_callback" in kwargs:
            kwargs["st_callback"] = self._writing(kwargs["st_callback"])
        return first + [self._written(one) for index in ids for one in self._new(index, **kwargs)]

    def _new(self, parameter_id: int, **kwargs: Any) -> list[Any]:
        """One proposal, or none; not of what was begun before, unless the tuner insists."""
        for _ in range(_TRIES):
            found = self.inner.generate_multiple_parameters([parameter_id], **kwargs)
            if not found or found[0] not in self.begun:
                break
            self.inner.trial_end(parameter_id, False)
        return found

    def _writing(self, send: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        return lambda parameter_id, parameters: send(parameter_id, self._written(parameters))

    def _written(self, parameters: Any) -> Any:
        with open(self.proposed, "a") as file:
            file.write(json.dumps(parameters, default=lambda number: number.item()) + "\n")
        return parameters

    def receive_trial_result(self, parameter_id: int, parameters: Any, value: Any, **kwargs: Any) -> None:
        """A result of the tuner's own proposal, or of one it was never asked for."""
        if parameter_id in self.ours:
            self.inner.import_data([{"parameter": self.ours[parameter_id], "value": value}])
        else:
            self.inner.receive_trial_result(parameter_id, parameters, value, **kwargs)

    def trial_end(self, parameter_id: int, success: bool, **kwargs: Any) -> None:
        """The end of the tuner's own proposal."""
        if parameter_id not in self.ours:
            self.inner.trial_end(parameter_id, success, **kwargs)
