"""Are the engine's faster images as good? ``results/bench-equal-fit.json``, from which ``bench.py`` takes its goal.

    python benchmarks/equal_fit.py lenet5-fashion-mnist --size 500 --steps 1500
    python benchmarks/equal_fit.py alexnet-cifar10 --size 100 --steps 300

For each teacher and seed: impressions of the published loop (batch 100, 1,500 steps); impressions of the engine for
the same targets in each of ``bench.py``'s ways, none with a worse mean fit than the published loop's; and two students
on each set. A student is the teacher without half of the channels of its convolutions (L1), distilled on the set. A
newly initialised network would learn next to nothing from so few images. ``bench.py`` measures the way with the most
accurate students. Students and teacher are compared on the last 5,000 images of the training split, which no student
has seen. The published loop's images are kept in ``build/equal-fit``. Finished measurements are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench import EQUAL_FIT, NETWORKS, inputs_for, plain_network, ways
from published_loops import zskd_loop
from torch import Tensor

from zskd_nni.compression.pruning.prune import prune
from zskd_nni.data.datasets import load_images
from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import PruningConfig
from zskd_nni.research.reproduction.pairs import PAIRS, Pair
from zskd_nni.research.train_teacher import HELD_OUT, TEACHERS, hold_out
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.synthesis.engine import synthesize_shard
from zskd_nni.training.distillation import distill
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.losses import soft_target_divergence
from zskd_nni.training.metrics import accuracy

KEPT = Path(__file__).resolve().parent.parent / "build" / "equal-fit"
NETWORK_OF = {weights: name for name, (_, _, weights, _) in NETWORKS.items()}
STUDENTS = 2
PRUNING = PruningConfig(config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], steps=0)


def published_images(name: str, teacher: Teacher, targets: Tensor, seed: int) -> Tensor:
    """The published loop's images for these targets, from disk if they were made before."""
    path = KEPT / f"{name}-{len(targets)}-seed{seed}.safetensors"
    if path.exists():
        tensors, _ = load_tensors(path)
        if torch.equal(tensors["targets"], targets):
            return tensors["images"]
    network = plain_network(NETWORK_OF[name], "cpu")
    torch.manual_seed(seed)
    with fast_response_norms(network):  # the same values, faster: the time is not measured here
        images, _ = zskd_loop(network, targets, teacher.spec.shape)
    save_tensors(path, {"images": images, "targets": targets}, {})
    return images


def compare(name: str, seed: int, size: int, steps: int, known: dict[str, Any]) -> dict[str, Any]:
    """The record of one teacher and seed. Sides with the same settings in ``known``, an earlier record, are kept."""
    pair = next(pair for pair in PAIRS.values() if pair.teacher == name)
    teacher = Teacher(plain_network(NETWORK_OF[name], "cpu"), TEACHERS[name].spec)
    targets = ZskdTargets(teacher, ZskdSettings()).targets(0, size, size, seed)
    images = published_images(name, teacher, targets, seed)
    with torch.no_grad():
        answers = torch.cat([teacher(part) for part in images.split(100)])
    goal = float(soft_target_divergence(answers, targets, 20.0).mean())
    students_of = StudentTraining(name, pair, teacher, seed, steps)
    record = dict(known) or {
        "name": name,
        "seed": seed,
        "impressions": size,
        "published": {"fit": round(goal, 4), "steps": 1500, **students_of(images)},
    }
    for way, settings in ways(goal, min(size, 250)).items():
        side, wanted = f"engine, {way}", json.loads(json.dumps(asdict(settings)))
        if record.get(side, {}).get("settings") == wanted:
            continue
        made = synthesize_shard(teacher, inputs_for(teacher, size, settings, seed), settings)
        record[side] = {
            "fit": round(float(made.fit.mean()), 4),
            "steps": round(float(made.steps.float().mean()), 1),
            **students_of(made.images),
            "settings": wanted,
        }
    if record == known:
        return record
    return record | {
        "student_steps": steps,
        "measured_on": f"the last {HELD_OUT} images of the training split of {TEACHERS[name].data}",
        "provenance": provenance("cpu", seed),
    }


class StudentTraining:
    """Trains students on a set of images and measures them."""

    def __init__(self, name: str, pair: Pair, teacher: Teacher, seed: int, steps: int) -> None:
        training = load_images(TEACHERS[name].data, "train")
        self.name, self.teacher, self.seed = name, teacher, seed
        self.settings = replace(pair.student, steps=steps, learning_rate=1e-3, feature_weight=3)
        _, self.held_out = hold_out(training)
        self.answers = logits_on(teacher, self.held_out, teacher.spec)
        network = copy.deepcopy(teacher.model).requires_grad_(True)
        self.pruned = prune(network, PRUNING, teacher, None, self.settings).network

    def __call__(self, images: Tensor) -> dict[str, Any]:
        """Mean accuracy and agreement with the teacher, in percent, and the accuracy of each student."""
        accuracies, agreements, spec = [], [], self.teacher.spec
        for number in range(STUDENTS):
            seed = self.seed + 100 * number
            student = copy.deepcopy(self.pruned).train().requires_grad_(True)
            source = StoredSource(images, self.settings.batch, seed, self.name)
            distill(student, self.teacher, source, self.settings, seed=seed, quiet=True)
            logits = logits_on(float_answers(student.eval(), spec), self.held_out, spec)
            accuracies.append(round(accuracy(logits, self.held_out.labels), 2))
            agreements.append(float((logits.argmax(1) == self.answers.argmax(1)).float().mean() * 100))
        return {
            "accuracy": round(statistics.mean(accuracies), 2),
            "agreement": round(statistics.mean(agreements), 2),
            "accuracies": accuracies,
        }


def main() -> None:
    """Parse the arguments and run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="+", choices=sorted(NETWORK_OF))
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of each student")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    records = json.loads(EQUAL_FIT.read_text()) if EQUAL_FIT.exists() else []
    for seed in arguments.seeds:
        for name in arguments.teachers:
            key = (name, seed, arguments.size)
            known = next((r for r in records if (r["name"], r["seed"], r["impressions"]) == key), {})
            record = compare(name, seed, arguments.size, arguments.steps, known)
            records = [r for r in records if r is not known] + [record]
            write_json(EQUAL_FIT, records)
            print(json.dumps({k: v for k, v in record.items() if k != "provenance"}), flush=True)


if __name__ == "__main__":
    main()
