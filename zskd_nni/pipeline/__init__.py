"""A recipe from its teacher to its report, in stages that resume where they stopped.

    teacher -> impressions -> student (pruned under NNI, distilled, shrunk, distilled) -> quantized student
            -> export, figures, report

Each stage keeps its result in the output folder; a stage whose result is there is not run again.

May import: :mod:`zskd_nni.compression` and the rooms below it.
"""

from zskd_nni.pipeline.run import Run
from zskd_nni.pipeline.students import StudentResult, Students

__all__ = ["Run", "StudentResult", "Students"]
