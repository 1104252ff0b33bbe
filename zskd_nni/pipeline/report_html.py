"""The report: ``report.json`` for programs, ``report.html`` and a table on the terminal for people."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zskd_nni.pipeline.neutral import HELD_OUT_BELOW_TEST, WORTH
from zskd_nni.runtime.files import write_atomic, write_json


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``."""
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", render_html(folder, report))


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows ``(what, teacher, student)`` of the headline table."""
    rows: list[tuple[str, str, str]] = []

    def add(what: str, teacher: Any, student: Any, show: Callable[[Any], str] = "{:,}".format) -> None:
        """Add a row, unless there is no figure of the student; the teacher's may be missing."""
        if student is not None:
            rows.append((what, "" if teacher is None else show(teacher), show(student)))

    def percent(value: float | None) -> str:
        return "no test data" if value is None else f"{value:.2f} %"

    def share(value: float) -> str:
        return percent(100 * value)

    accuracy, sizes, latency = report["accuracy"], report["bytes"], report["latency_ms"]
    add("accuracy", percent(accuracy["teacher"]), percent(accuracy["student"]), str)
    add("agreement with the teacher", None, report["agreement"], share)
    if report["quantization"] is not None:
        add(f"accuracy, {_integers(report)}", None, percent(accuracy["student_int8"]), str)
        add(f"agreement, {_integers(report)}", None, report["agreement_int8"], share)
        add("int8 in onnxruntime agrees with NNI", None, report["agreement_onnx"], share)
    add("parameters", report["parameters"]["teacher"], report["parameters"]["student"])
    zeros = (report["pruning"] or {}).get("zeros")
    add("zeros in the masked weights", None, zeros, lambda value: f"{100 * value:.1f} %")
    add("weights, bytes", sizes["teacher"]["safetensors"], sizes["student"]["safetensors"])
    add("ONNX, bytes", sizes["teacher"]["onnx"], sizes["student"]["onnx"])
    add("int8 ONNX, bytes", None, sizes["student"]["onnx_int8"])
    add("one image, ms", latency["teacher"], latency["student"], "{:.3f}".format)
    add("one image, int8, ms", None, latency["student_int8"], "{:.3f}".format)
    for control in report["controls"].values():
        label = f"control: {control['label']}"
        for suffix, what in (("", label), ("_int8", f"{label}, {_integers(report)}")):
            agreement, measured = control[f"agreement{suffix}"], control[f"accuracy{suffix}"]
            # In floating point a student that is only calibrated is the teacher itself.
            if agreement is not None and (suffix or not report["only_calibrated"]):
                add(what, None, f"{share(agreement)} agree" if measured is None else percent(measured), str)
    return rows


def _integers(report: dict[str, Any]) -> str:
    return "int8" if report["quantization"] and report["quantization"]["exported"] else "quantized (simulated)"


def remarks(report: dict[str, Any]) -> list[str]:
    """Remarks that are needed to read the figures."""
    found = []
    if not report["data_free"]:
        ceiling = report["recipe"]["transfer"]["method"] == "real"
        found.append(
            f"NOT data-free: the student was trained on real {'training ' if ceiling else ''}images "
            f"({report['learnt_on']}){_count(report)}."
            + (" This is an upper limit for data-free runs." if ceiling else "")
        )
    if report.get("learnt_on_what_is_measured"):
        found.append("The accuracy is of images that the student was trained on: it does not apply to other images.")
    given = (report["impressions"] or {}).get("given")
    if given is not None:
        found.append(
            f"The student was trained on a given store: {given['targets'].get('method', 'impressions')}, seed "
            f"{given['seed']}. The recipe's transfer section made the held-out images alone."
        )
    distillation = report["recipe"]["distillation"]
    asked = distillation["features"] == "auto" and distillation["feature_weight"]
    if asked and (report["history"] or {}).get("features") == []:
        found.append(
            "distillation.features is auto, and student and teacher have no hidden layer of one name and width: the "
            "logits alone were matched."
        )
    if report["evaluation"] is None and "agreement_neutral" in report:
        found.append(f"{WORTH}. On held-out images of the student's own kind it is {report['agreement_held_out']:.2%}.")
        if report["data_free"]:
            runs, least, most = HELD_OUT_BELOW_TEST
            found.append(
                f"In {runs} recorded runs agreement on held-out images was {least} to {most} points below agreement on "
                "test data."
            )
    found += _slower(report)
    found += (report.get("first_look") or {}).get("warnings", [])
    notes = {part: (report[part] or {}).get("note") for part in ("pruning", "quantization")}
    return found + [f"{part.capitalize()}: {note}." for part, note in notes.items() if note]


def _count(report: dict[str, Any]) -> str:
    """How many real images were used, in words; empty where that is not known."""
    count, size = report.get("real_images"), report["recipe"]["transfer"].get("size", 0)
    if count is None:
        return ""
    if report["recipe"]["transfer"].get("also") is not None:
        return f", {count:,} real images"
    return f", {count:,} images" + (f" of the {size:,} that transfer.size asks for" if count < size else "")


def _slower(report: dict[str, Any]) -> list[str]:
    """One line where the int8 file is slower than the one in floating point, and what would make it faster."""
    integers, floats = report["latency_ms"].get("student_int8"), report["latency_ms"].get("student")
    if integers is None or floats is None or integers <= floats:
        return []
    section = report["recipe"]["compression"]["quantization"] or {}
    targets = [name for entry in section.get("config_list", ()) for name in entry.get("target_names", ())]
    tries = [] if section.get("fuse_batch_norm") or section.get("fuse_names") else ["fuse_batch_norm: true"]
    tries += [] if any(name.startswith("_output_") for name in targets) else ["_output_ among the target_names"]
    hint = f"; compression.quantization: {' and '.join(tries)} may help" if tries else ""
    return [
        f"int8 is slower here ({integers:.3f} ms for {floats:.3f} ms): small networks gain bytes, not time, "
        f"as numbers are converted between layers{hint}."
    ]


def render_table(report: dict[str, Any]) -> str:
    """The headline table and the seconds of each stage as plain text."""
    rows = [("", "teacher", "student"), *table_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += ["", *(f"{stage:<32}{seconds:>8.1f} s" for stage, seconds in report["seconds"].items()), ""]
    measured, classifier = report["agreement_on"], report["classifier"]
    lines += [f"agreement is measured on {measured}", f"the teacher's classifier is {classifier}", *remarks(report)]
    return "\n".join(lines)


def render_html(folder: Path, report: dict[str, Any]) -> str:
    """``report.html`` as one file, its picture and curves inside."""
    import jinja2

    loader = jinja2.PackageLoader("zskd_nni.pipeline")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    picture = folder / "impressions.png"
    impressions = report["impressions"]
    return environment.get_template("report.html").render(
        report=report,
        rows=table_rows(report),
        remarks=remarks(report),
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.exists() else None,
        curve=_curve(report["history"]),
        steps=_histogram(impressions["steps"]) if impressions else None,
        layers=[row for row in (report["pruning"] or {}).get("layers", []) if _changed(row)],
    )


def _changed(row: dict[str, Any]) -> bool:
    return row["inputs_before"] != row["inputs_after"] or row["outputs_before"] != row["outputs_after"]


def _curve(history: dict[str, Any] | None, width: int = 560, height: int = 140) -> str | None:
    """Points of an SVG polyline of the loss, on a logarithmic scale."""
    if not history or len(history["losses"]) < 2:
        return None
    values = [math.log10(max(loss, 1e-12)) for loss in history["losses"]]
    low, high, last = min(values), max(values), history["steps"][-1]
    return " ".join(
        f"{width * step / last:.1f},{height * (high - value) / max(high - low, 1e-9):.1f}"
        for step, value in zip(history["steps"], values, strict=True)
    )


def _histogram(steps: dict[str, int], bars: int = 20) -> list[tuple[str, int, float]]:
    """``(range of steps, impressions, share of the fullest bar)`` of at most ``bars`` bars."""
    if not steps:
        return []
    counts = {int(step): count for step, count in steps.items()}
    width = -(-(max(counts) + 1) // bars)
    binned: Counter[int] = Counter()
    for step, count in counts.items():
        binned[step - step % width] += count
    fullest = max(binned.values())
    return [
        (f"{first}" if width == 1 else f"{first} to {first + width - 1}", count, count / fullest)
        for first, count in sorted(binned.items())
    ]
