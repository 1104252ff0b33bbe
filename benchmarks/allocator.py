"""What keeping freed memory is worth: AlexNet's student step and its images, with and without, in turn.

    python benchmarks/allocator.py

Each measurement is a process of its own, because the setting holds for a process. The ratio is of one run, of the same
work, the two ways alternating; the best of the rounds counts on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

ROUNDS = 3
OF_THE_USER = ("MALLOC_", "GLIBC_TUNABLES")


def measure() -> dict[str, float]:
    """Seconds of 40 student steps and of 128 impressions, and the peak of memory in MiB."""
    import torch

    from zskd_nni import DistillationSettings, distill, load_teacher
    from zskd_nni.data.sources import ProceduralSource
    from zskd_nni.methods.zskd import METHOD, ZskdTargets
    from zskd_nni.models.zoo import alexnet_half
    from zskd_nni.synthesis.synthesize import synthesize

    torch.set_num_threads(1)
    teacher = load_teacher("alexnet-cifar10")
    source = ProceduralSource("leaves", teacher.spec, 64)
    found = {}
    for steps in (4, 40):  # the first call warms up
        start = time.perf_counter()
        distill(alexnet_half(), teacher, source, DistillationSettings(steps=steps, batch=64), quiet=True)
        found["student"] = time.perf_counter() - start
    options = METHOD.options("best-colour", {})
    plan = ZskdTargets(teacher, options.targets)
    start = time.perf_counter()
    synthesize(teacher, plan, options.synthesis, size=128, seed=0, folder=tempfile.mkdtemp(), quiet=True)
    found["images"] = time.perf_counter() - start
    found["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def main() -> None:
    """Alternate the two ways, and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().measure:
        print(json.dumps(measure()))
        return
    found: dict[str, list[dict[str, float]]] = {"kept": [], "given back": []}
    for _ in range(ROUNDS):
        for way, runs in found.items():
            environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_USER)}
            if way == "given back":  # with a variable of the user's nothing is set; this one changes nothing else
                environment["MALLOC_CHECK_"] = "0"
            command = [sys.executable, __file__, "--measure"]
            runs.append(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout))
    print("| | kept | given back | ratio |\n| --- | --- | --- | --- |")
    for what in found["kept"][0]:
        kept, back = (min(run[what] for run in runs) for runs in found.values())
        print(f"| {what} | {kept:.2f} | {back:.2f} | {back / kept:.2f} |")


if __name__ == "__main__":
    main()
