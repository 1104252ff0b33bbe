"""Runs the code of FastDFKD (Fang et al., AAAI 2022) from a clone of it; none of that code is kept here.

    git clone https://github.com/zju-vipa/Fast-Datafree
    pip install kornia termcolor einops             # its other dependencies
    python benchmarks/fast_datafree.py Fast-Datafree --device cuda --data-root DATA
    zskd-nni reproduce cifar10-wrn --cell zskt-best-wrn-16-1 --seed 0 --device cuda    # ours, on the same GPU

Its own program trains a WRN-16-1 from our WRN-40-2 for CIFAR-10, with the settings that its authors publish (5 steps of
the generator per batch). The file has the student's accuracy over the seconds of training, without the seconds of
evaluation. The goal is reached when the accuracy is first that high. The program's reading of training images is left
out, because it does not use them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from peers import commit_of
from torch.utils.data import TensorDataset
from torchvision import transforms

from zskd_nni.data.datasets import load_images
from zskd_nni.models.build import build_network
from zskd_nni.models.zoo.trained import trained_weights
from zskd_nni.research.train_teacher import TEACHERS
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance
from zskd_nni.runtime.tensors import load_tensors

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "wrn-40-2-cifar10"
# scripts/fast_cifar.sh, WRN-40-2 to WRN-16-1 in 5 steps; "modify --dataset (and nothing else) to apply to CIFAR10".
PUBLISHED = (
    "--batch_size 256 --lr 0.2 --kd_steps 400 --ep_steps 400 --adv 1.1 --bn 10.0 --oh 0.4 --act 0 --balance 0 --T 20 "
    "--bn_mmt 0.9 --warmup 20 --epochs 220 --dataset cifar10 --method fast_meta --g_steps 5 --lr_z 0.01 --lr_g 3e-3 "
    "--is_maml 1 --reset_l0 1 --reset_bn 0 --save_dir run/wrn-5 --log_tag wrn-5"
)


def renamed(name: str) -> str:
    """The peer's name of a tensor of our wide residual networks."""
    parts = name.split(".")
    if parts[0].startswith("group"):
        parts[:1] = [parts[0].replace("group", "block"), "layer"]
    if parts[0] == "bn":
        parts[0] = "bn1"
    return ".".join("convShortcut" if part == "shortcut" else part for part in parts)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="of zju-vipa/Fast-Datafree")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="the peer takes the first GPU")
    parser.add_argument("--data-root", type=Path, help="real test images; the variable ZSKD_NNI_DATA where absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--goal", type=float, default=89.3, help="accuracy in percent to reach")
    parser.add_argument("--set", default="", help='flags that replace published ones: --set="--epochs 2"')
    parser.add_argument("--random-teacher", action="store_true", help="to try it without trained weights")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench-fast-datafree.json")
    arguments = parser.parse_args()
    if not (arguments.clone / "datafree_kd.py").exists():
        raise SystemExit(f"{arguments.clone} has no datafree_kd.py: it must be a clone of zju-vipa/Fast-Datafree.")
    commit, out = commit_of(arguments.clone), arguments.out.resolve()
    try:
        test = load_images("cifar10", "test", arguments.data_root)
        teacher = teachers_weights(arguments.random_teacher)
    except UserError as error:
        raise SystemExit(str(error)) from error
    sys.path.insert(0, str(arguments.clone.resolve()))
    os.chdir(tempfile.mkdtemp(prefix="peer-"))  # it writes all its images and checkpoints into the current folder
    curve = run(teacher, test, arguments)
    reached = [seconds for seconds, accuracy in curve if accuracy >= arguments.goal]
    write_json(
        out,
        {
            "name": "FastDFKD, WRN-40-2 to WRN-16-1, CIFAR-10",
            "peer": f"zju-vipa/Fast-Datafree@{commit}",
            "settings": PUBLISHED,
            "changed": arguments.set,
            "goal": arguments.goal,
            "seconds_to_goal": reached[0] if reached else None,
            "last": curve[-1],
            "curve": curve,
            "provenance": provenance(arguments.device, arguments.seed),
        },
    )
    goal = f"reached at {reached[0]:.0f} s" if reached else "not reached"
    print(f"{out}: {curve[-1][1]:.2f} % after {curve[-1][0]:.0f} s, goal {goal}")


def teachers_weights(random: bool) -> dict[str, torch.Tensor]:
    """Our teacher's tensors under the peer's names.

    Raises:
        UserError: there is no trained teacher.
    """
    recipe = TEACHERS[TEACHER]
    ours = build_network(recipe.network, recipe.arguments)
    if not random:
        ours.load_state_dict(load_tensors(trained_weights(TEACHER))[0])
    return {renamed(name): value for name, value in ours.state_dict().items()}


def run(teacher: dict[str, torch.Tensor], test: Any, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Run the peer's program: seconds, and accuracy in percent, after each of its epochs."""
    # The torchvision that it was written for had this function in another module.
    moved = types.ModuleType("torchvision.models.utils")
    moved.load_state_dict_from_url = torch.hub.load_state_dict_from_url  # type: ignore[attr-defined]
    sys.modules[moved.__name__] = moved
    import datafree  # type: ignore[import-not-found]
    import datafree_kd  # type: ignore[import-not-found]
    import registry  # type: ignore[import-not-found]

    spec = TEACHERS[TEACHER].spec
    agree(teacher, registry)
    weights = Path("checkpoints/pretrained/cifar10_wrn40_2.pth")
    weights.parent.mkdir(parents=True)
    torch.save({"state_dict": teacher}, weights)
    Path("checkpoints/datafree-fast_meta").mkdir()
    shown = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(**registry.NORMALIZE_DICT["cifar10"]),
        ]
    )
    measured = TensorDataset(spec.normalise(test.pixels(slice(None), spec)), test.labels)
    registry.get_dataset = lambda **_: (10, argparse.Namespace(transform=shown), measured)
    curve: list[tuple[float, float]] = []
    evaluator, began, evaluating = datafree.evaluators.classification_evaluator, time.perf_counter(), 0.0

    def timed(loader: Any) -> Any:
        evaluate = evaluator(loader)

        def call(student: Any, **options: Any) -> Any:
            nonlocal evaluating
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            started = time.perf_counter()
            result = evaluate(student, **options)
            curve.append((round(started - began - evaluating, 2), round(float(result["Acc"][0]), 2)))
            evaluating += time.perf_counter() - started
            return result

        return call

    datafree.evaluators.classification_evaluator = timed
    if arguments.device == "cpu":  # to try it: the program knows no device but CUDA's
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        torch.cuda.set_device = lambda _: None  # type: ignore[assignment]
        whole = datafree_kd.main_worker
        datafree_kd.main_worker = lambda _, count, options: whole("cpu", count, options)
    sys.argv = [
        "datafree_kd.py",
        *PUBLISHED.split(),
        "--gpu",
        "0",
        "--seed",
        str(arguments.seed),
        *arguments.set.split(),
    ]
    datafree_kd.main()
    return curve


def agree(teacher: dict[str, torch.Tensor], registry: Any) -> None:
    """Stop if the peer's network does not give our network's logits."""
    recipe = TEACHERS[TEACHER]
    ours, theirs = build_network(recipe.network, recipe.arguments).eval(), registry.get_model("wrn40_2", 10).eval()
    theirs.load_state_dict(teacher)
    ours.load_state_dict({name: teacher[renamed(name)] for name in ours.state_dict()})
    images = torch.randn(4, *recipe.spec.shape)
    with torch.no_grad():
        if not torch.allclose(ours(images), theirs(images), atol=1e-3):
            raise SystemExit("The clone's WRN-40-2 differs from ours.")


if __name__ == "__main__":
    main()
