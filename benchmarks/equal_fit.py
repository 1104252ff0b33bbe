"""Does stopping at the published schedule's fit teach as well? ``results/bench-equal-fit.json``.

    python benchmarks/equal_fit.py lenet5-fashion-mnist lenet5-mnist --size 1000 --seeds 0 1 2

For each teacher and seed: the published loop (batch 100, 1,500 steps), the engine with the same targets stopping each
image at the published loop's mean fit, and one student on each with the same recipe. Student and teacher are compared
on the last 5,000 images of the training split, which no student has seen. About half an hour a teacher and seed on one
core at 1,000 images. A finished seed is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from published_loops import zskd_loop
from torch import Tensor

from zskd_nni.augment import Augmentation
from zskd_nni.data import load_images
from zskd_nni.distillation import DistillationSettings, distill
from zskd_nni.evaluation import logits_on
from zskd_nni.files import load_tensors, write_json
from zskd_nni.inputs import InputSpec
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.metrics import accuracy
from zskd_nni.networks import build_network
from zskd_nni.provenance import provenance
from zskd_nni.synthesis import SynthesisSettings
from zskd_nni.synthesis.engine import Orders, synthesize_shard
from zskd_nni.teacher import Teacher
from zskd_nni.train_teacher import TEACHERS
from zskd_nni.transfer import StoredSource
from zskd_nni.zoo.trained import trained_weights

RESULT = Path(__file__).resolve().parent.parent / "results" / "bench-equal-fit.json"
STUDENTS = {"zoo:lenet5": "zoo:lenet5_half", "zoo:alexnet": "zoo:alexnet_half"}
HELD_OUT = 5000


def compare(name: str, seed: int, size: int, steps: int) -> dict[str, Any]:
    """One teacher, one seed."""
    recipe = TEACHERS[name]
    network = build_network(recipe.network, recipe.arguments)
    network.load_state_dict(load_tensors(trained_weights(name))[0])
    teacher = Teacher(network, recipe.spec)
    targets = ZskdTargets(teacher, ZskdSettings()).targets(0, size, size, seed)
    torch.manual_seed(seed)
    started = time.perf_counter()
    images, fit = zskd_loop(network.eval().requires_grad_(False), targets, recipe.spec.shape)
    seconds = time.perf_counter() - started
    goal = float(fit.mean())
    settings = SynthesisSettings(learning_rate=0.05, tolerance=goal, max_steps=100)
    torch.manual_seed(seed)
    orders = Orders(
        targets,
        torch.rand((size, *recipe.spec.shape)),
        torch.full((size, 1), settings.temperatures[0]),
        torch.zeros(size),
        torch.full((size,), float(settings.step_limits[1])),
    )
    started = time.perf_counter()
    stopped = synthesize_shard(teacher, orders, settings)
    ours = time.perf_counter() - started
    training = load_images(recipe.data, "train")
    held_out = training.subset(slice(len(training) - HELD_OUT, None))
    answers = logits_on(teacher, held_out, recipe.spec)

    def taught(images: Tensor) -> dict[str, float]:
        torch.manual_seed(seed)
        student = build_network(STUDENTS[recipe.network], recipe.arguments)
        moves = Augmentation(rotation=8, translation=0.05, scale=(0.9, 1.1), shear=3)
        recipe_of_student = DistillationSettings(
            temperature=20, steps=steps, batch=128, learning_rate=0.005, augmentation=moves
        )
        distill(student, teacher, StoredSource(images, 128, seed, name), recipe_of_student, seed=seed, quiet=True)
        logits = logits_on(_with(student, recipe.spec), held_out, recipe.spec)
        agreement = float((logits.argmax(1) == answers.argmax(1)).float().mean() * 100)
        return {"accuracy": round(accuracy(logits, held_out.labels), 2), "agreement": round(agreement, 2)}

    return {
        "name": name,
        "seed": seed,
        "impressions": size,
        "published": {"fit": round(goal, 4), "steps": 1500, "seconds": round(seconds, 1), **taught(images)},
        "stopped": {
            "fit": round(float(stopped.fit.mean()), 4),
            "steps": round(float(stopped.steps.float().mean()), 1),
            "seconds": round(ours, 1),
            **taught(stopped.images),
        },
        "student_steps": steps,
        "measured_on": f"the last {HELD_OUT} images of the training split of {recipe.data}",
        "provenance": provenance("cpu", seed),
    }


def _with(student: torch.nn.Module, spec: InputSpec) -> Any:
    return lambda images: student(spec.normalise(images))


def main() -> None:
    """Parse the arguments and run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="+", choices=sorted(TEACHERS))
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2500, help="of the student")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    records = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for seed in arguments.seeds:
        for name in arguments.teachers:
            key = (name, seed, arguments.size)
            if any((r["name"], r["seed"], r["impressions"]) == key for r in records):
                continue
            records.append(compare(name, seed, arguments.size, arguments.steps))
            write_json(RESULT, records)
            print(json.dumps({k: v for k, v in records[-1].items() if k != "provenance"}), flush=True)


if __name__ == "__main__":
    main()
