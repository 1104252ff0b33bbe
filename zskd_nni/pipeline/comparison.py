"""The networks of a run side by side, and the verdict: what the page and the terminal both show.

Networks are compared with others of the same precision only: there is a table in floating point, and one in integers
where the recipe quantizes. A table has one column a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zskd_nni.pipeline.neutral import HELD_OUT_BELOW_TEST

FLOAT = "float32"
_KINDS = {"test": "agreement, test", "held_out": "agreement, held-out", "neutral": "agreement, procedural"}


@dataclass(frozen=True)
class Network:
    """What was measured of one network; None where it was not.

    Attributes:
        label: the head of its column.
        role: teacher, student, twin or control.
        precision: of its numbers.
        accuracy: on test data, in percent.
        agreement: share of images with the teacher's class, in [0, 1], by kind of image.
        parameters: how many.
        macs: multiply-accumulates for one image.
        bytes: of its ONNX file.
        milliseconds: of one image in onnxruntime.
    """

    label: str
    role: str
    precision: str
    accuracy: float | None
    agreement: dict[str, float | None]
    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    milliseconds: float | None = None

    def measured(self, by_accuracy: bool) -> float | None:
        """By which it is compared, in percent: accuracy, or agreement on the neutral images without test data."""
        neutral = self.agreement.get("neutral")
        return self.accuracy if by_accuracy else None if neutral is None else 100 * neutral


@dataclass(frozen=True)
class Table:
    """Networks of one precision, their teacher, and the student before it was quantized.

    Attributes:
        title: the precision.
        columns: heads, one a network.
        rows: ``(what, one cell a network)``; a cell is empty where there is no figure.
        student: number of the column of the student in this precision, from 0.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    student: int


def precision_of_integers(report: dict[str, Any]) -> str:
    """What the quantized student is called."""
    exported = report["quantization"] and report["quantization"]["exported"]
    return bits_of(report["recipe"]["compression"]["quantization"]) if exported else "quantized (simulated)"


def bits_of(quantization: Mapping[str, Any]) -> str:
    """The precision that a recipe's ``compression.quantization`` asks for.

    Example:
        >>> bits_of({"config_list": [{"target_names": ["_input_", "weight"], "quant_dtype": "int8"}]})
        'int8'
        >>> weight = {"weight": {"quant_dtype": "int4"}}
        >>> bits_of({"config_list": [{"quant_dtype": "int8", "target_settings": weight}]})
        'W4A8'
    """
    found: dict[bool, set[int]] = {True: set(), False: set()}  # of weights, of activations
    for entry in quantization["config_list"]:
        settings, names = entry.get("target_settings", {}), entry.get("target_names", ["_input_", "weight"])
        for name in {*names, *settings}:
            dtype = settings.get(name, {}).get("quant_dtype") or entry.get("quant_dtype") or "int8"
            if name != "bias":
                found[not name.startswith("_")].add(int(dtype.lstrip("uint")))
    if found[True] | found[False] <= {8}:
        return "int8"
    weights, activations = ("/".join(map(str, sorted(found[of]))) or "32" for of in (True, False))
    return f"W{weights}A{activations}"


def networks(report: dict[str, Any]) -> list[Network]:
    """All networks of a report: the teacher first, those of each precision together, the student first of these."""
    found = [_teacher(report)]
    for suffix in ("", "_int8") if report["quantization"] is not None else ("",):
        precision = precision_of_integers(report) if suffix else FLOAT
        if suffix or not report["only_calibrated"] or report["quantization"] is None:
            found.append(_student(report, suffix, precision))
            found += _others(report, suffix, precision)
    return found


def _teacher(report: dict[str, Any]) -> Network:
    return Network(
        "teacher",
        "teacher",
        FLOAT,
        report["accuracy"]["teacher"],
        {},
        report["parameters"]["teacher"],
        report.get("macs", {}).get("teacher"),
        report["bytes"]["teacher"]["onnx"],
        report["latency_ms"]["teacher"],
    )


def _student(report: dict[str, Any], suffix: str, precision: str) -> Network:
    return Network(
        "student",
        "student",
        precision,
        report["accuracy"][f"student{suffix}"],
        _agreements(report, "student", suffix, report),
        report["parameters"]["student"],
        report.get("macs", {}).get("student"),
        report["bytes"]["student"][f"onnx{suffix}"],
        report["latency_ms"][f"student{suffix}"],
    )


def _others(report: dict[str, Any], suffix: str, precision: str) -> Iterator[Network]:
    """The twin on real images and the controls."""
    twin = report.get("twin")
    if twin is not None and twin[f"agreement{suffix}"] is not None:
        agreement = {"neutral": None if suffix else twin["agreement_neutral"]}
        if twin[f"accuracy{suffix}"] is not None:
            agreement["test"] = twin[f"agreement{suffix}"]
        yield Network(twin["label"], "twin", precision, twin[f"accuracy{suffix}"], agreement)
    for name, control in report["controls"].items():
        if control[f"agreement{suffix}"] is not None:
            agreement = _agreements(report, name, suffix, control)
            yield Network(control["label"], "control", precision, control[f"accuracy{suffix}"], agreement)


def _agreements(report: dict[str, Any], name: str, suffix: str, figures: dict[str, Any]) -> dict[str, float | None]:
    """By kind of image; reports of earlier versions have one kind."""
    kind = "neutral" if report["evaluation"] is None else "test"
    return report.get("agreements", {}).get(f"{name}{suffix}") or {kind: figures.get(f"agreement{suffix}")}


def tables(report: dict[str, Any]) -> list[Table]:
    """One table for each precision, with the teacher in its first column."""
    teacher, *rest = networks(report)
    found = []
    for precision in dict.fromkeys(network.precision for network in rest):
        same = [network for network in rest if network.precision == precision]
        before = (
            [] if precision == FLOAT else [each for each in rest if (each.role, each.precision) == ("student", FLOAT)]
        )
        columns = [teacher, *before, *same]
        labels = [network.label for network in columns]
        if precision != FLOAT:
            labels = [*(f"{network.label}, {FLOAT}" for network in (teacher, *before)), *labels[1 + len(before) :]]
            labels[1 + len(before)] = f"student, {precision}"
        found.append(Table(precision, labels, list(_rows(columns)), 1 + len(before)))
    return found


def _rows(columns: list[Network]) -> Iterator[tuple[str, list[str]]]:
    teacher = columns[0]

    def row(what: str, value: Callable[[Network], Any], show: Callable[[Any], str]) -> Iterator[tuple[str, list[str]]]:
        """A row, unless only the teacher has a figure."""
        values = [value(network) for network in columns]
        if any(each is not None for each in values[1:]):
            yield what, ["" if each is None else show(each) for each in values]

    def less(network: Network) -> float | None:
        known = teacher.accuracy is not None and network.accuracy is not None and network is not teacher
        return network.accuracy - teacher.accuracy if known else None  # type: ignore[operator]

    def share(name: str) -> Callable[[Network], float | None]:
        def of(network: Network) -> float | None:
            own, whole = getattr(network, name), getattr(teacher, name)
            return own / whole if own is not None and whole else None

        return of

    yield from row("accuracy", lambda network: network.accuracy, "{:.2f} %".format)
    yield from row("to the teacher, points", less, "{:+.2f}".format)
    for kind, what in _KINDS.items():
        yield from row(what, lambda network, kind=kind: network.agreement.get(kind), _share(2))  # type: ignore[misc]
    yield from row("parameters", lambda network: network.parameters, "{:,}".format)
    yield from row("MACs an image", lambda network: network.macs, _compact)
    yield from row("ONNX, bytes", lambda network: network.bytes, "{:,}".format)
    yield from row("of the teacher's bytes", share("bytes"), _share(0))
    yield from row("one image, ms", lambda network: network.milliseconds, "{:.3f}".format)
    yield from row("of the teacher's time", share("milliseconds"), "{:.2f} x".format)


def _share(digits: int) -> Callable[[float], str]:
    return lambda share: f"{100 * share:.{digits}f} %"


def _compact(count: int) -> str:
    """A count with three digits.

    Example:
        >>> _compact(640), _compact(416_520), _compact(76_902_912), _compact(1_814_073_344)
        ('640', '417 k', '76.9 M', '1.81 G')
    """
    if count < 1000:
        return str(count)
    power = min(3, int(math.log10(count)) // 3)
    number = count / 1000**power
    return f"{number:.{max(0, 2 - int(math.log10(number)))}f} {' kMG'[power]}"


def verdict(report: dict[str, Any]) -> list[str]:
    """What came out, in sentences; the first one is the most important."""
    teacher, *rest = networks(report)
    student = [network for network in rest if network.role == "student"][-1]
    who = "The student" if student.precision == FLOAT else f"The {student.precision} student"
    return [
        _of_accuracy(report, who, teacher, student),
        *_of_size(teacher, student),
        *_of_controls(report, student, [each for each in rest if each.precision == student.precision]),
    ]


def _of_accuracy(report: dict[str, Any], who: str, teacher: Network, student: Network) -> str:
    if student.accuracy is None or teacher.accuracy is None:
        share = f"{student.measured(by_accuracy=False) or 0:.1f} % of the procedural images"
        return f"{who} chooses the teacher's class for {share}; its accuracy is not known, as there was no test data."
    gap = student.accuracy - teacher.accuracy
    side = (
        "as many as the teacher"
        if abs(gap) < 0.005
        else (f"{abs(gap):.2f} points {'below' if gap < 0 else 'above'} the teacher's {teacher.accuracy:.2f} %")
    )
    return f"{who} is right on {student.accuracy:.2f} % of the test images of {report['evaluation']}, {side}."


def _of_size(teacher: Network, student: Network) -> Iterator[str]:
    parts = []
    if student.bytes and teacher.bytes:
        parts.append(f"Its ONNX file has {_share(0)(student.bytes / teacher.bytes)} of the teacher's bytes")
    if student.milliseconds and teacher.milliseconds:
        ratio = student.milliseconds / teacher.milliseconds
        takes = "about as long" if 0.95 < ratio < 1.05 else f"{ratio:.2f} times as long"
        parts.append(f"an image takes {takes} on one CPU thread")
    if parts:
        sentence = ", and ".join(parts)
        yield sentence[0].upper() + sentence[1:] + "."


def _of_controls(report: dict[str, Any], student: Network, same_precision: list[Network]) -> Iterator[str]:
    """How far the student is from the others of its precision, all in accuracy or all in agreement."""
    by_accuracy = student.accuracy is not None
    measured = student.measured(by_accuracy)
    if measured is None:
        return
    unit = "points" if by_accuracy else "points of agreement"
    others = [(each, value) for each in same_precision if (value := each.measured(by_accuracy)) is not None]

    def compared(value: float) -> str:
        gap = measured - value
        return f"{abs(gap):.2f} {unit} {'above' if gap > 0 else 'below'}" if abs(gap) >= 0.005 else "as good as"

    for twin, value in others:
        if twin.role == "twin":
            yield f"The student is {compared(value)} the same recipe on real images ({value:.2f} %)."
    controls = [(each, value) for each, value in others if each.role == "control"]
    if not controls:
        return
    best, value = max(controls, key=lambda each: each[1])
    gap, doubt = measured - value, _doubt(report, student, best)
    remark = ""
    if gap <= 0:
        remark = ", so that its images have not helped"
    elif doubt is not None and gap < doubt:
        remark = f"; {report['test_images']:,} test images hardly tell apart less than {doubt:.1f} points"
    named = f"the best control of its precision, {best.label} ({value:.2f} %)"
    yield f"The student is {compared(value)} {named}{remark}."


def _doubt(report: dict[str, Any], one: Network, other: Network) -> float | None:
    """Two standard errors of the difference of two accuracies, in points, if they were measured on separate images."""
    count = report.get("test_images")
    if not count or one.accuracy is None or other.accuracy is None:
        return None
    return 2 * math.sqrt(sum(p * (100 - p) for p in (one.accuracy, other.accuracy)) / count)


def worth_of_agreement(report: dict[str, Any]) -> list[str]:
    """What agreement on each kind of image says about the networks of this run, in sentences."""
    if "agreements" not in report:  # of an earlier version
        return []
    kinds = [each for each in networks(report) if each.role == "student"][-1].agreement
    learnt = "calibrated" if report["only_calibrated"] else "trained"
    if report["data_free"]:
        runs, least, most = HELD_OUT_BELOW_TEST
        said = [
            f"Held-out images are made like those that the student was {learnt} on, with another seed. The controls "
            "were not, so agreement on such images favours the student. It is not accuracy."
        ]
        if kinds["test"] is not None:  # a remark says it where there is none
            said.append(f"In {runs} recorded runs it was {least} to {most} points below agreement on test images.")
    else:
        said = [f"Held-out images are of the kind that the student was {learnt} on, and were kept from it."]
    said.append(
        "Procedural images are the same for every method. Agreement on them is lower still, and can compare students "
        "that were trained alike."
    )
    if kinds["test"] is not None:
        said.append(
            f"Of this student, agreement is {_share(1)(kinds['test'])} on the test images, "
            f"{_share(1)(kinds['held_out'] or 0)} on the held-out and {_share(1)(kinds['neutral'] or 0)} on the "
            "procedural ones."
        )
        said += _order(report)
    return said


def _order(report: dict[str, Any]) -> Iterator[str]:
    """Whether agreement orders the networks as accuracy does."""
    precision = networks(report)[-1].precision
    same = [each for each in networks(report) if each.precision == precision and each.role in ("student", "control")]
    known = [each for each in same if each.accuracy is not None]
    if len(known) < 2:
        return
    by_accuracy = sorted(known, key=lambda each: float(each.accuracy or 0))
    right = []
    for kind, name in (("held_out", "held-out"), ("neutral", "procedural")):
        if sorted(by_accuracy, key=lambda each: float(each.agreement.get(kind) or 0)) == by_accuracy:
            right.append(name)
    what = f"student and controls ({precision}) in the same order as accuracy"
    where = {2: "Agreement on either kind", 1: f"Agreement on {right[0]} images alone"} if right else {}
    yield f"{where.get(len(right), 'Agreement on neither kind')} puts {what}."
