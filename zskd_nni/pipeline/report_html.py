"""The report: ``report.json`` for programs, ``report.html`` and a table on the terminal for people."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from zskd_nni.runtime.files import write_atomic, write_json


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``."""
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", render_html(folder, report))


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows ``(what, teacher, student)`` of the headline table."""

    def percent(value: float | None) -> str:
        return "no test data" if value is None else f"{value:.2f} %"

    integers = report["quantization"] is not None
    rows = [
        ("accuracy", percent(report["accuracy"]["teacher"]), percent(report["accuracy"]["student"])),
        ("agreement with the teacher", "", f"{100 * report['agreement']:.2f} %"),
    ]
    if integers:
        rows.append((f"accuracy, {_integers(report)}", "", percent(report["accuracy"]["student_int8"])))
        if report["agreement_int8"] is not None:
            rows.append((f"agreement, {_integers(report)}", "", f"{100 * report['agreement_int8']:.2f} %"))
        if report["agreement_onnx"] is not None:
            rows.append(("int8 in onnxruntime agrees with NNI", "", f"{100 * report['agreement_onnx']:.2f} %"))
    rows.append(("parameters", f"{report['parameters']['teacher']:,}", f"{report['parameters']['student']:,}"))
    zeros = (report["pruning"] or {}).get("zeros")
    if zeros is not None:
        rows.append(("zeros in the masked weights", "", f"{100 * zeros:.1f} %"))
    for kind, name in (("safetensors", "weights, bytes"), ("onnx", "ONNX, bytes")):
        teacher, student = report["bytes"]["teacher"][kind], report["bytes"]["student"][kind]
        rows.append((name, f"{teacher:,}", f"{student:,}"))
    if report["bytes"]["student"]["onnx_int8"] is not None:
        rows.append(("int8 ONNX, bytes", "", f"{report['bytes']['student']['onnx_int8']:,}"))
    latency = report["latency_ms"]
    rows.append(("one image, ms", f"{latency['teacher']:.3f}", f"{latency['student']:.3f}"))
    if latency["student_int8"] is not None:
        rows.append(("one image, int8, ms", "", f"{latency['student_int8']:.3f}"))
    for control in report["controls"].values():
        label = f"control: {control['label']}"
        rows_of_control = [("", label), ("_int8", f"{label}, {_integers(report)}")]
        if report["only_calibrated"]:
            del rows_of_control[0]  # in floating point it is the teacher itself
        for suffix, named in rows_of_control:
            accuracy, agreement = control[f"accuracy{suffix}"], control[f"agreement{suffix}"]
            if agreement is not None:
                rows.append(
                    (named, "", percent(accuracy) if accuracy is not None else f"{100 * agreement:.2f} % agree")
                )
    return rows


def _integers(report: dict[str, Any]) -> str:
    return "int8" if report["quantization"] and report["quantization"]["exported"] else "quantized (simulated)"


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader must know beside the figures, in sentences."""
    found = []
    if not report["data_free"]:
        ceiling = report["recipe"]["transfer"]["method"] == "real"
        found.append(
            f"NOT data-free: the student learnt on real {'training ' if ceiling else ''}images "
            f"({report['learnt_on']})." + (" This is a ceiling for data-free runs, not one of them." if ceiling else "")
        )
    if report.get("learnt_on_what_is_measured"):
        found.append("The accuracy is of images that the student learnt on: it says nothing about others.")
    given = (report["impressions"] or {}).get("given")
    if given is not None:
        found.append(
            f"The student learnt on a store that was there: {given['targets'].get('method', 'impressions')}, seed "
            f"{given['seed']}. The recipe's transfer section made the held-out images alone."
        )
    history = report["history"] or {}
    wanted = (
        report["recipe"]["distillation"]["features"] == "auto" and report["recipe"]["distillation"]["feature_weight"]
    )
    if wanted and history.get("features") == []:
        found.append(
            "distillation.features is auto, and student and teacher have no hidden layer of one name and width: the "
            "logits alone were matched."
        )
    for part in ("pruning", "quantization"):
        note = (report[part] or {}).get("note")
        if note:
            found.append(f"{part.capitalize()}: {note}.")
    return found


def render_table(report: dict[str, Any]) -> str:
    """The headline table and the seconds of each stage as plain text."""
    rows = [("", "teacher", "student"), *table_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append("")
    for stage, seconds in report["seconds"].items():
        lines.append(f"{stage:<32}{seconds:>8.1f} s")
    lines.append("")
    lines.append(f"agreement is measured on {report['agreement_on']}")
    lines.append(f"the teacher's classifier is {report['classifier']}")
    lines.extend(remarks(report))
    return "\n".join(lines)


def render_html(folder: Path, report: dict[str, Any]) -> str:
    """``report.html`` as one file, its picture and curves inside."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zskd_nni"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
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
    import math

    if not history or len(history["losses"]) < 2:
        return None
    values = [math.log10(max(loss, 1e-12)) for loss in history["losses"]]
    low, high = min(values), max(values)
    last = history["steps"][-1]
    points = (
        (width * step / last, height * (high - value) / max(high - low, 1e-9))
        for step, value in zip(history["steps"], values, strict=True)
    )
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _histogram(steps: dict[str, int], bars: int = 20) -> list[tuple[str, int, float]]:
    """``(range of steps, impressions, share of the fullest bar)`` of at most ``bars`` bars."""
    if not steps:
        return []
    counts = {int(step): count for step, count in steps.items()}
    largest = max(counts)
    width = max(1, -(-(largest + 1) // bars))
    binned: dict[int, int] = {}
    for step, count in counts.items():
        binned[step // width] = binned.get(step // width, 0) + count
    top = max(binned.values())
    return [
        (f"{b * width}" if width == 1 else f"{b * width} to {b * width + width - 1}", count, count / top)
        for b, count in sorted(binned.items())
    ]
