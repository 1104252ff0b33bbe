"""The twin of a run: the same recipe on real images, made by another call. Only its report is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zskd_nni.recipes.schema import completed
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

# Keys of a recipe in which a twin may differ: its images, and what is told or made beside the student.
_MAY_DIFFER = {"transfer", "controls", "name", "description", "selected_on", "scale"}


@dataclass(frozen=True)
class Twin:
    """A finished run on real images.

    Attributes:
        report: its ``report.json``.
    """

    report: dict[str, Any]

    def figures(self) -> dict[str, Any]:
        """Those of its student, as in the reports of other runs."""
        report = self.report
        return {
            "accuracy": report["accuracy"]["student"],
            "agreement": report["agreement"],
            "accuracy_int8": report["accuracy"]["student_int8"],
            "agreement_int8": report["agreement_int8"],
            "agreement_neutral": report["agreement_neutral"],
            "label": "on real images",
            "what": f"the same recipe, trained on real images ({report['learnt_on']})",
        }


def read_twin(folder: Path, identity: dict[str, Any]) -> Twin:
    """Read the report of a finished run of the same recipe on real images.

    Args:
        folder: of the other run.
        identity: of this run.

    Raises:
        UserError: there is none, it read no real images, or more is different than its images.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"--twin: {folder} has no report.json; name the folder of a finished run on real images.")
    report = read_json(path)
    recipe = report.get("recipe") if isinstance(report, dict) else None
    if not isinstance(recipe, dict) or not isinstance(report.get("provenance"), dict):
        raise UserError(f"--twin: {path} is not the report of a run.")
    if report.get("data_free") is not False:
        raise UserError(f"--twin: the run in {folder} was trained without real images; a twin is trained on them.")
    transfer = recipe.get("transfer")
    method = transfer.get("method") if isinstance(transfer, dict) else None
    if method != "real":  # ats, or own images beside synthetic ones, are not the upper limit
        raise UserError(f"--twin: the run in {folder} has transfer.method {method}; a twin has transfer.method real.")
    mine, recipe = completed(identity["recipe"]), completed(recipe)
    keys = [key for key in sorted({*mine, *recipe} - _MAY_DIFFER) if mine.get(key) != recipe.get(key)]
    if report["provenance"].get("teacher") != identity["teacher"]:
        keys.append("the teacher's weights")
    if keys:
        raise UserError(f"--twin: the run in {folder} differs in more than its images: {', '.join(keys)}.")
    try:
        Twin(report).figures()
    except (KeyError, TypeError) as error:
        raise UserError(f"--twin: {path} lacks figures of its student; run that recipe again.") from error
    return Twin(report)
