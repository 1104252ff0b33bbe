"""The figures of docs/howto/own-teacher.md: what its run at full size left, kept as ``results/pages/my-resnet.json``.

    python benchmarks/resnet_page.py out/my-resnet

The argument is the folder of the page's own ``zskd-nni compress my-resnet.yml --out out/my-resnet``. Without it the
page's table is written again from the record.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from zskd_nni.runtime.files import make_folder, write_json

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "howto" / "own-teacher.md"
RECORD = ROOT / "results" / "pages" / "my-resnet.json"
KEPT = ("name", "accuracy", "parameters", "bytes", "controls", "impressions", "seconds", "recipe", "provenance")
_TABLE = re.compile(r"(<!-- table: the run -->\n).*?(<!-- end of the table -->)", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """A row for each network: accuracy on the test images, and bytes of its ONNX file. Then where the time went."""
    accuracy, sizes, control = record["accuracy"], record["bytes"], record["controls"]["none"]
    rows = [
        ("teacher", accuracy["teacher"], sizes["teacher"]["onnx"]),
        ("student", accuracy["student"], sizes["student"]["onnx"]),
        ("student in int8", accuracy["student_int8"], sizes["student"]["onnx_int8"]),
        ("control: pruned, not distilled", control["accuracy"], sizes["student"]["onnx"]),
        ("the same in int8", control["accuracy_int8"], sizes["student"]["onnx_int8"]),
    ]
    lines = ["| network | test accuracy, % | ONNX file, bytes |", "| --- | --- | --- |"]
    seconds, count = record["seconds"], record["impressions"]["impressions"]
    steps, threads = record["recipe"]["distillation"]["steps"], record["provenance"]["threads"]
    time = (
        f"It took {seconds['total']:.0f} s on {threads} thread:\n"
        f"{seconds['synthesis']:.0f} s for {count} "
        f"impressions and those held out, {seconds['distillation of student']:.0f} s for {steps} steps of distillation."
    )
    return "\n".join([*lines, *(f"| {name} | {value:.2f} | {size:,} |" for name, value, size in rows), "", time])


def with_table(text: str, record: dict[str, Any]) -> str:
    """The page with the table of this record."""
    new, count = _TABLE.subn(lambda match: f"{match[1]}\n{table(record)}\n\n{match[2]}", text)
    if count != 1:
        raise SystemExit(f"{PAGE} has no '<!-- table: the run -->' that '<!-- end of the table -->' closes.")
    return new


def main() -> None:
    """Parse the arguments, keep the record, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of the finished run")
    arguments = parser.parse_args()
    if arguments.run is not None:
        report = json.loads((arguments.run / "report.json").read_text())
        make_folder(RECORD.parent)
        write_json(RECORD, {key: report[key] for key in KEPT})
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
