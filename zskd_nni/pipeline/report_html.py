"""The report: ``report.json`` for programs, ``report.html`` and tables on the terminal for people."""

from __future__ import annotations

import base64
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zskd_nni.pipeline.comparison import Table, tables, verdict, worth_of_agreement
from zskd_nni.pipeline.forecast import compared
from zskd_nni.pipeline.loss_chart import loss_chart
from zskd_nni.pipeline.neutral import HELD_OUT_BELOW_TEST, WORTH
from zskd_nni.runtime.files import write_atomic, write_json

_TERMINAL = 80  # columns


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``."""
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", render_html(folder, report))


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
        held_out = 100 * report["agreement_held_out"]
        found.append(f"{WORTH}. On held-out images of the student's own kind it is {held_out:.2f} %.")
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
    foldable = report.get("batch_norm", True) and not (section.get("fuse_batch_norm") or section.get("fuse_names"))
    tries = ["fuse_batch_norm: true"] if foldable else []
    tries += [] if any(name.startswith("_output_") for name in targets) else ["_output_ among the target_names"]
    hint = f"; compression.quantization: {' and '.join(tries)} may help" if tries else ""
    return [
        f"int8 is slower here ({integers:.3f} ms for {floats:.3f} ms): small networks gain bytes, not time, "
        f"as numbers are converted between layers{hint}."
    ]


def notes(report: dict[str, Any]) -> list[str]:
    """What is to be known of the figures' making."""
    found = [
        "Agreement is the share of images on which a network chooses the teacher's class; " + _agreement_on(report)
    ]
    for other in (report.get("twin"), *report["controls"].values()):
        if other is not None:
            found.append(f"{other['label'].capitalize()}: {other['what']}.")
    if report.get("twin") is not None or report["controls"]:
        found.append("These have the student's architecture, and are not exported.")
    if report.get("macs"):
        found.append("MACs are multiply-accumulates.")
    found.append("Milliseconds are the median of one image on one CPU thread in onnxruntime.")
    if report["agreement_onnx"] is not None:
        found.append(
            f"On {100 * report['agreement_onnx']:.2f} % of the held-out images the int8 file chooses the class that "
            "NNI's simulation chooses."
        )
    zeros = (report["pruning"] or {}).get("zeros")
    if zeros is not None:
        found.append(f"{100 * zeros:.1f} % of the masked weights are zero.")
    if report["evaluation"] is not None and not report["learnt_on_what_is_measured"]:
        found.append(
            f"The test data ({report['evaluation']}) was read to measure the teacher first, and all networks at the "
            "end. No student was trained on these images."
        )
    if (sentence := compared(report)) is not None:
        found.append(sentence)
    if report["provenance"].get("selected_on"):
        found.append(f"Where the settings come from: {report['provenance']['selected_on']}.")
    return found


def render_table(report: dict[str, Any]) -> str:
    """The verdict, the tables and the seconds of each stage as plain text."""
    lines = [*_wrapped(" ".join(verdict(report))), ""]
    for table in tables(report):
        lines += [*_table_lines(table), ""]
    lines += [f"{work:<45}{seconds:>8.1f} s" for work, seconds in report["seconds"].items()]
    if (sentence := compared(report)) is not None:
        lines += _wrapped(sentence)
    lines += ["", *_wrapped(f"Agreement, {_agreement_on(report)}")]
    lines += _wrapped(f"The teacher's classifier is {report['classifier']}.")
    for remark in remarks(report):
        lines += _wrapped(remark)
    return "\n".join(lines)


def _agreement_on(report: dict[str, Any]) -> str:
    """The images of the agreement in the report's headline, in words."""
    kind = "procedural" if report["evaluation"] is None else "test"
    return f"{kind}: on {report['agreement_on']}."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _TERMINAL, break_long_words=False, break_on_hyphens=False)


def _table_lines(table: Table) -> Iterator[str]:
    """A table as wide as a terminal, in two or more parts if it must be; heads on as many lines as their words need."""
    heads = [textwrap.wrap(head, 11, break_long_words=False) for head in table.columns]
    first = max(len(table.title), *(len(what) for what, _ in table.rows))
    widths = [
        max(max(map(len, head)), *(len(cells[column]) for _, cells in table.rows)) for column, head in enumerate(heads)
    ]
    begin = 0
    while begin < len(heads):
        end = begin + 1
        while end < len(heads) and first + sum(width + 2 for width in widths[begin : end + 1]) <= _TERMINAL:
            end += 1
        part = slice(begin, end)
        height = max(map(len, heads[part]))
        if begin:
            yield ""
        for line in range(height):
            words = ["" if line < height - len(head) else head[line - height + len(head)] for head in heads[part]]
            yield _line(table.title if line == height - 1 else "", words, first, widths[part])
        yield "-" * (first + sum(width + 2 for width in widths[part]))
        yield from (_line(what, cells[part], first, widths[part]) for what, cells in table.rows if any(cells[part]))
        begin = end


def _line(what: str, cells: list[str], first: int, widths: list[int]) -> str:
    aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join([f"{what:<{first}}", *aligned]).rstrip()


def render_html(folder: Path, report: dict[str, Any]) -> str:
    """``report.html`` as one file, its picture and curves inside."""
    import jinja2
    from markupsafe import Markup

    loader = jinja2.PackageLoader("zskd_nni.pipeline")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    picture = folder / "impressions.png"
    impressions = report["impressions"]
    charts = {title: loss_chart(history) for title, history in _histories(report).items()}
    return environment.get_template("report.html").render(
        report=report,
        verdict=[sentence.replace(" %", "\N{NO-BREAK SPACE}%") for sentence in verdict(report)],
        tables=tables(report),
        remarks=remarks(report),
        notes=notes(report),
        worth=worth_of_agreement(report),
        picture=base64.b64encode(picture.read_bytes()).decode() if picture.exists() else None,
        charts={title: Markup(chart) for title, chart in charts.items() if chart is not None},  # made of numbers alone
        steps=_histogram(impressions["steps"]) if impressions else None,
        layers=[row for row in (report["pruning"] or {}).get("layers", []) if _changed(row)],
    )


def _histories(report: dict[str, Any]) -> dict[str, Any]:
    """The student's trainings -> their losses."""
    under_masks, afterwards = (report["pruning"] or {}).get("history"), report["history"]
    if under_masks == afterwards:  # one training for both
        under_masks = None
    return {"Distillation under the masks of pruning": under_masks, "Distillation": afterwards}


def _changed(row: dict[str, Any]) -> bool:
    return row["inputs_before"] != row["inputs_after"] or row["outputs_before"] != row["outputs_after"]


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
