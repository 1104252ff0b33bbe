"""A tuner with a memory, around any of NNI's, so that a stopped search resumes with all that it knew.

NNI's ``resume`` reports only finished trials to its tuner, counts cancelled ones as done, restarts the tuner's random
numbers, and may confuse trials. So each start of a search is a new NNI experiment. Its tuner first gets the known
results, and first proposes what was proposed before and never finished.

NNI's dispatcher process loads a copy of this file, and has ten seconds to start: it imports nothing but NNI.
"""

from __future__ import annotations

import json
from typing import Any

from nni.tools.package_utils.tuner_factory import create_builtin_class_instance, create_customized_class_instance
from nni.tuner import Tuner

_TRIES = 20


class RememberingTuner(Tuner):
    """Passes everything on to the tuner it holds.

    Args:
        tuner: NNI's mapping of it.
        known: finished trials, ``{"parameter": ..., "value": ...}``.
        unfinished: parameters to propose first.
        proposed: file to which every new proposal is added, one JSON mapping a line.
    """

    def __init__(
        self, tuner: dict[str, Any], known: list[dict[str, Any]], unfinished: list[dict[str, Any]], proposed: str
    ) -> None:
        if "className" in tuner:
            self.inner = create_customized_class_instance(tuner)
        else:
            self.inner = create_builtin_class_instance(tuner["name"], tuner.get("classArgs"), "tuners")
        self.known, self.unfinished, self.proposed = known, unfinished, proposed
        self.waiting = list(unfinished)
        self.resumed: dict[int, dict[str, Any]] = {}

    def update_search_space(self, search_space: dict[str, Any]) -> None:
        """Pass the space on, and then what is known in it."""
        self.inner.update_search_space(search_space)
        if self.known:
            self.inner.import_data(self.known)
            self.known = []

    def generate_multiple_parameters(self, parameter_id_list: list[int], **kwargs: Any) -> list[dict[str, Any]]:
        """The unfinished parameters, then the tuner's proposals; fewer if it has no more."""
        ids = list(parameter_id_list)
        while ids and self.waiting:
            self.resumed[ids.pop(0)] = self.waiting.pop(0)
        first = [self.resumed[index] for index in parameter_id_list if index in self.resumed]
        if send := kwargs.get("st_callback"):
            kwargs["st_callback"] = lambda index, parameters: send(index, self._record(parameters))
        return first + [self._record(each) for index in ids for each in self._propose(index, **kwargs)]

    def _propose(self, parameter_id: int, **kwargs: Any) -> list[Any]:
        """One proposal, or none; none of the unfinished ones, unless the tuner insists."""
        for _ in range(_TRIES):
            found = self.inner.generate_multiple_parameters([parameter_id], **kwargs)
            if not found or found[0] not in self.unfinished:
                break
            self.inner.trial_end(parameter_id, False)
        return found

    def _record(self, parameters: Any) -> Any:
        with open(self.proposed, "a") as file:
            file.write(json.dumps(parameters, default=lambda number: number.item()) + "\n")
        return parameters

    def receive_trial_result(self, parameter_id: int, parameters: Any, value: Any, **kwargs: Any) -> None:
        """Pass on a result, as known data if the tuner never proposed these parameters itself."""
        if parameter_id in self.resumed:
            self.inner.import_data([{"parameter": self.resumed[parameter_id], "value": value}])
        else:
            self.inner.receive_trial_result(parameter_id, parameters, value, **kwargs)

    def trial_end(self, parameter_id: int, success: bool, **kwargs: Any) -> None:
        """Pass on the end of the tuner's own proposals."""
        if parameter_id not in self.resumed:
            self.inner.trial_end(parameter_id, success, **kwargs)
