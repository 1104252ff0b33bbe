"""Students trained by several processes: equal to one process up to rounding, and byte for byte after a resume."""

from __future__ import annotations

import copy
import json
import os
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, small_network, small_teacher, tensors_in, wait_for
from launching import append, launch, start_launch
from torch import Tensor, nn

from zskd_nni.data.sources import StoredSource
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.distributed import only_writers, share, team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.training.checkpoint import Checkpoint
from zskd_nni.training.data_parallel import DataParallel
from zskd_nni.training.distillation import DistillationSettings, distill

STEPS = 60
# After so many steps, of weights and losses; rounding in another order grows with every step.
TOLERANCE: dict[str, float] = {"rtol": 1e-3, "atol": 1e-4}
BATCH = 18  # no multiple of 4


def images() -> Tensor:
    return torch.rand((90, *SMALL.shape), generator=torch.Generator().manual_seed(3))


def settings(**changes: Any) -> DistillationSettings:
    return DistillationSettings(**{"temperature": 4, "steps": STEPS, "batch": BATCH, "warmup": 4, **changes})


def student(
    folder: str, features: str = "none", every: float = 1e9, log: str | None = None, batch: int = BATCH
) -> None:
    """In each process; a network with batch normalisation."""
    network = small_network(1)
    if log is not None:
        real = Checkpoint.save

        def save(checkpoint: Checkpoint, training: Any, step: int, history: Any) -> None:
            real(checkpoint, training, step, history)
            append(log, f"{os.getpid()} {step}")

        Checkpoint.save = save  # type: ignore[method-assign]
        append(log, f"{os.getpid()} started")
    history = distill(
        network,
        small_teacher(),
        StoredSource(images(), batch, 5, "set"),
        settings(features=features, batch=batch),
        seed=2,
        checkpoint=Path(folder) / "student.checkpoint.pt",
        checkpoint_every=every,
        quiet=True,
    )
    keep(folder, network, history.losses)


def keep(folder: str, network: nn.Module, losses: list[float]) -> None:
    state = {name: value for name, value in network.state_dict().items() if value is not None}
    save_tensors(Path(folder) / f"{team().rank}.safetensors", state, {"losses": json.dumps(losses)})


def results(folder: Path) -> list[dict[str, Tensor]]:
    return [load_tensors(path)[0] for path in sorted(folder.glob("[0-9].safetensors"))]


def losses(folder: Path) -> list[float]:
    return json.loads(load_tensors(folder / "0.safetensors")[1]["losses"])


def compare(one: Path, many: Path, count: int) -> None:
    """All processes end with the same bits, which are those of one alone up to rounding."""
    (alone,) = results(one)
    together = results(many)
    assert len(together) == count
    for state in together:
        assert all(torch.equal(state[name], together[0][name]) for name in alone)
    alone, first = comparable(alone), comparable(together[0])
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, **TOLERANCE, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert losses(many) == pytest.approx(losses(one), rel=1e-4)


def comparable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what drifts by rounding and changes no answer: a bias in front of a normalisation, which removes it."""
    return {
        name: value
        for name, value in state.items()
        if not (name.startswith("conv") and name.endswith(".bias")) and not name.endswith("running_mean")
    }


def folders(place: Path) -> tuple[Path, Path]:
    for name in ("one", "many"):
        (place / name).mkdir()
    return place / "one", place / "many"


@pytest.mark.parametrize(("count", "features"), [(2, "auto"), (4, "none")])
def test_a_student_is_the_same_whoever_teaches_it(count: int, features: str, tmp_path: Path) -> None:
    one, many = folders(tmp_path)
    student(str(one), features)
    launch(count, student, str(many), features)
    compare(one, many, count)
    (alone,) = results(one)
    assert not torch.equal(alone["norm.running_mean"], small_network(1).norm.running_mean)


def test_killed_and_started_anew_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = folders(tmp_path)
    launch(2, student, str(whole), "none", 0.0)
    log = tmp_path / "log"
    launcher = start_launch(2, student, str(killed), "none", 0.0, str(log), restarts=1)

    def saved() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if not line.endswith("started")]

    wait_for(lambda: len(saved()) >= STEPS // 4, 300)
    first = int(saved()[0].split()[0])
    started = [int(line.split()[0]) for line in log.read_text().splitlines() if line.endswith("started")]
    os.kill(next(pid for pid in started if pid != first), signal.SIGKILL)
    launcher.join()
    assert launcher.exitcode == 0
    steps = [int(line.split()[1]) for line in saved()]
    assert steps == sorted(steps) and steps[-1] == STEPS
    assert len({line.split()[0] for line in saved()}) == 2, "one process alone writes, before and after"
    assert sha256_of_file(whole / "0.safetensors") == sha256_of_file(killed / "0.safetensors")


def too_small(folder: str) -> None:
    with pytest.raises(UserError, match=r"A batch of 1 images cannot be divided among 2 processes"):
        student(folder, batch=1)


def test_a_batch_smaller_than_the_team_is_refused(tmp_path: Path) -> None:
    launch(2, too_small, str(tmp_path))


def game_with_dropout(folder: str) -> None:
    from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource

    teacher = small_teacher()
    source = ZsktSource(teacher, ZsktSettings(rounds=3, student_steps=2, batch=8, width=8), 8, 0)
    network = nn.Sequential(small_network(1), nn.Dropout(0.5))
    history = distill(network, teacher, source, settings(steps=6, batch=8), seed=2, quiet=True)
    state = {name: value for name, value in tensors_in(source.state_dict()) if value.is_floating_point()}
    save_tensors(Path(folder) / f"{team().rank}.safetensors", state, {"losses": json.dumps(history.losses)})


def test_all_have_the_same_generator_though_dropout_draws_other_masks(tmp_path: Path) -> None:
    launch(2, game_with_dropout, str(tmp_path))
    first, second = results(tmp_path)
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def game_of_drifting_generators(folder: str) -> None:
    """As on GPUs, whose sums differ in the last bits from one process to the next."""
    from zskd_nni.methods.zskt.source import ZsktSource

    original = ZsktSource.batch

    def drifting(self: ZsktSource, *arguments: Any) -> Tensor:
        images: Tensor = original(self, *arguments)
        return images + 0.1 * team().rank

    ZsktSource.batch = drifting  # type: ignore[method-assign]
    game_with_dropout(folder)


def test_all_learn_on_the_first_ones_images(tmp_path: Path) -> None:
    for name, game in (("alike", game_with_dropout), ("drifting", game_of_drifting_generators)):
        (tmp_path / name).mkdir()
        launch(2, game, str(tmp_path / name))
    (alike, _), (drifting, _) = results(tmp_path / "alike"), results(tmp_path / "drifting")
    assert alike and all(torch.equal(alike[name], drifting[name]) for name in alike)


def gradients_are_let_go(folder: str) -> None:
    """What :func:`~zskd_nni.training.loop.fit` keeps of a step is its loss alone."""
    shared, network = DataParallel(team()), small_network(1)
    loss = network(images()[:4]).sum()
    loss.backward()
    kept = shared.add_gradients(network, torch.optim.SGD(network.parameters(), 0.1), loss)
    assert kept.untyped_storage().nbytes() == 4
    network.extra = nn.Parameter(torch.zeros(2 + team().rank))
    with pytest.raises(UserError, match="different networks"):
        shared.begin(network)


def test_of_a_step_its_loss_is_kept_and_different_networks_are_refused(tmp_path: Path) -> None:
    launch(2, gradients_are_let_go, str(tmp_path))


def one_folder_again_and_again(folder: str) -> None:
    for _ in range(20):
        with only_writers(Path(folder)):
            pass


def test_a_team_may_take_a_folder_again_at_once(tmp_path: Path) -> None:
    launch(2, one_folder_again_and_again, str(tmp_path))


def near_chance(folder: str) -> None:
    run = Run(load_recipe("digits-prune50", [*TINY, "teacher.input.mean=[9]"]), Path(folder) / "out", quiet=True)
    with pytest.raises(UserError, match=r"and chance is 10\.00 %"):
        run.require_a_teacher()


def test_a_wrong_teacher_stops_every_process(tmp_path: Path) -> None:
    launch(2, near_chance, str(tmp_path))


def an_error_of_its_own(folder: str) -> None:
    with pytest.raises(RuntimeError, match="scalar type"):
        team().add(torch.zeros(2, dtype=torch.int16))


def test_an_error_that_is_not_of_the_connection_is_not_called_a_death(tmp_path: Path) -> None:
    launch(2, an_error_of_its_own, str(tmp_path))


# Under NNI.


def agp(folder: str) -> None:
    from nni.compression.pruning import AGPPruner, L1NormPruner

    fused(folder, lambda network, config, evaluator: AGPPruner(L1NormPruner(network, config, evaluator), 4, 6), True)


def taylor(folder: str) -> None:
    from nni.compression.pruning import AGPPruner, TaylorPruner

    fused(
        folder, lambda network, config, evaluator: AGPPruner(TaylorPruner(network, config, evaluator, 4), 4, 6), False
    )


def fused(folder: str, make: Any, divided: bool) -> None:
    from zskd_nni.compression import DataFreeEvaluator, ZeroShotDistiller
    from zskd_nni.models.teacher import Teacher

    seen: list[int] = []
    real = DataParallel.part

    def part(self: DataParallel, whole: Tensor) -> Tensor:
        own = real(self, whole)
        seen.append(len(own))
        return own

    DataParallel.part = part  # type: ignore[method-assign]
    network = small_network(0)
    evaluator = DataFreeEvaluator(
        Teacher(network, SMALL),
        StoredSource(images(), BATCH, 5, "set"),
        settings(),
        checkpoint=Path(folder) / "fused.checkpoint.pt",
        pseudo_labels=True,
        quiet=True,
    )
    pruner = make(network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator)
    distiller = ZeroShotDistiller.from_compressor(pruner, [], evaluator.teacher, None, 1.0)
    distiller.compress(STEPS, None)
    shared = divided and not team().alone
    assert set(seen) == ({len(torch.empty(BATCH).tensor_split(team().size)[team().rank])} if shared else {BATCH})
    keep(folder, distiller.bound_model, evaluator.histories[-1].losses)
    DataParallel.part = real  # type: ignore[method-assign]


def test_a_layer_linked_to_several_is_not_divided() -> None:
    """A distiller takes the nearest of them, which may be another one for each part of a batch."""
    from nni.compression.distillation import DynamicLayerwiseDistiller

    from zskd_nni.compression import DataFreeEvaluator

    for link, divided in ((["hidden"], True), (["hidden", "hidden"], False), ("auto", True)):
        teacher, network = small_teacher(), small_network(1)
        evaluator = DataFreeEvaluator(teacher, StoredSource(images(), BATCH, 5, "set"), settings(), quiet=True)
        config = [{"op_names": ["hidden"], "lambda": 1.0, "link": link, "apply_method": "mse"}]
        predict = lambda batch, model: model(batch)  # noqa: E731
        DynamicLayerwiseDistiller(network, config, evaluator, copy.deepcopy(teacher.model), predict, 0.0).compress(
            4, None
        )
        assert evaluator._compression.can_be_divided() is divided


@pytest.mark.parametrize("compression", [agp, taylor])
def test_a_student_under_nni_is_the_same_whoever_teaches_it(compression: Any, tmp_path: Path) -> None:
    one, many = folders(tmp_path)
    compression(str(one))
    launch(2, compression, str(many))
    compare(one, many, 2)
    masks = [name for name in results(one)[0] if "mask" in name]
    assert masks and any((results(one)[0][name] == 0).any() for name in masks)


# A whole recipe.

TINY = (
    "transfer.size=100",
    "transfer.held_out=40",
    "transfer.synthesis.shard=20",
    "transfer.synthesis.max_steps=8",
    "compression.pruning.steps=10",
    "distillation.steps=20",
    "controls=[none]",
)


def recipe(folder: str) -> None:
    report = Run(load_recipe("digits-prune50", TINY), Path(folder) / "out", quiet=True).compress()
    assert report["agreement"] > 0.5


def recipe_without_export(folder: str) -> None:
    """As far as the students, which are what takes long."""
    run = Run(load_recipe("digits-prune50", TINY), Path(folder) / "out", quiet=True)
    with run.owned():
        source = run.transfer()
        run.held_out()
        run.students.make("student", source)
        run.students.make("control-none", source, train=False)


@pytest.mark.slow
def test_a_whole_recipe(tmp_path: Path) -> None:
    one, many = folders(tmp_path)
    recipe_without_export(str(one))
    launch(2, recipe, str(many))
    for path in [path.relative_to(one) for path in one.rglob("*") if path.is_file()]:
        assert (many / path).is_file()
        if path.match("impressions*/shard-*"):
            assert sha256_of_file(one / path) == sha256_of_file(many / path), "impressions are the same to the byte"
    assert not list(many.rglob("*.checkpoint.pt")) and not list(many.rglob(".*.tmp"))
    records = [json.loads((place / "out" / "state" / "student.json").read_text())["record"] for place in (one, many)]
    assert records[0]["pruning"]["removed_channels"] == records[1]["pruning"]["removed_channels"]
    for part in ("pruning", "distillation"):
        first, second = (record[part].get("history", record[part])["losses"] for record in records)
        assert second == pytest.approx(first, rel=1e-3)
    report = json.loads((many / "out" / "report.json").read_text())
    assert report["pruning"] == records[1]["pruning"]


def test_everything_is_shared_and_nothing_twice() -> None:
    for count in range(30):
        for size in range(1, 9):
            parts = [share(range(count), rank, size) for rank in range(size)]
            assert sorted(chain.from_iterable(parts)) == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
