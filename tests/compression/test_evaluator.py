from __future__ import annotations

import copy
import signal
from dataclasses import fields
from pathlib import Path

import nni
import pytest
import torch
from nni.compression.distillation import Adaptive1dLayerwiseDistiller
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from nni.compression.quantization import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression import DataFreeEvaluator, ZeroShotDistiller
from zskd_nni.compression.evaluator import EvaluatorOptions
from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.sources import NoiseSource, StoredSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5, lenet5_half
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.training.distillation import DistillationSettings

torch.set_num_threads(1)
SPEC = InputSpec((1, 32, 32), mean=(0.4,), std=(0.3,))
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class NormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU()
        self.pool = nn.MaxPool2d(4)
        self.conv2, self.norm2, self.act2 = nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.norm1(self.conv1(x))))
        return self.head(self.act2(self.norm2(self.conv2(x))).flatten(1))


def int8(dtype: str = "int8", scheme: str = "affine") -> list[dict]:
    targets = ["_input_", "weight"]
    return [{"op_types": ["Conv2d", "Linear"], "target_names": targets, "quant_dtype": dtype, "quant_scheme": scheme}]


FOLDED = [
    {
        "op_names": ["conv1", "conv2"],
        "target_names": ["weight", "_output_"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "fuse_names": [("conv1", "norm1", "act1"), ("conv2", "norm2")],
    },
    {"op_names": ["head"], "target_names": ["_input_", "weight"], "quant_dtype": "int8", "quant_scheme": "symmetric"},
]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    network = lenet5()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= 2
    return Teacher(network, SPEC)


def images(count: int = 256) -> Tensor:
    coarse = torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, size=32, mode="bilinear")


def source(batch: int = 32) -> StoredSource:
    return StoredSource(images(), batch, 0, "coarse")


def evaluator_for(teacher: Teacher, **changes) -> DataFreeEvaluator:
    known = {field.name for field in fields(EvaluatorOptions)}
    options = EvaluatorOptions(**{key: changes.pop(key) for key in known & changes.keys()})
    settings = DistillationSettings(warmup=2, learning_rate=1e-3)
    defaults = {"teacher": teacher, "source": source(), "settings": settings, "quiet": True, "options": options}
    return DataFreeEvaluator(**{**defaults, **changes})


def run_steps(evaluator: DataFreeEvaluator, model: nn.Module, steps: int | None, epochs: int | None = None) -> None:
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    evaluator.train(steps, epochs)
    evaluator.unbind_model()


def test_a_batch_is_what_student_and_teacher_see(teacher):
    settings = DistillationSettings(augmentation=Augmentation(contrast=0.5))
    evaluator = evaluator_for(teacher, settings=settings)
    plain = evaluator_for(teacher).batch(0, generator(1))
    torch.testing.assert_close(plain, (source().batch(0, generator(1)) - 0.4) / 0.3)
    low, high = (0 - 0.4) / 0.3, (1 - 0.4) / 0.3
    changed = evaluator.batch(0, generator(1))
    assert not torch.equal(plain, changed) and changed.min() >= low and changed.max() <= high


def test_lengths_of_a_training(teacher):
    evaluator = evaluator_for(teacher, settings=DistillationSettings(steps=77))
    assert evaluator.steps_for(5, None) == 5
    assert evaluator.steps_for(None, 3) == 3 * 256 // 32
    assert evaluator_for(teacher, source=source(100)).steps_for(None, 3) == 6  # as the source counts its epochs
    assert evaluator.steps_for(20, 2) == 16
    assert evaluator.steps_for(None, None) == 77
    assert evaluator.steps_for(0, None) == 0
    assert evaluator_for(teacher, source=NoiseSource(SPEC, 8)).steps_for(None, 2) == 2000


def test_pseudo_labels_are_the_teachers_choices(teacher):
    evaluator = evaluator_for(teacher, pseudo_labels=True)
    student = lenet5_half()
    batch = SPEC.normalise(images(16))
    loss = evaluator._training_step(batch, student)
    choices = teacher.model(batch).argmax(1)
    by_hand = -student(batch).log_softmax(1)[torch.arange(16), choices].mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    alone = evaluator_for(teacher)._training_step(batch, student)
    assert alone.item() == 0 and alone.requires_grad


def test_training_on_pseudo_labels_raises_agreement(teacher):
    torch.manual_seed(5)
    student = lenet5_half()
    evaluator = evaluator_for(teacher, pseudo_labels=True)
    before = evaluator.evaluating_func(student)
    run_steps(evaluator, student, None, 20)
    assert evaluator.evaluating_func(student) > max(0.7, before + 0.2)
    assert not student.training


def test_without_a_loss_it_warns_and_nothing_changes(teacher, caplog):
    student = lenet5_half()
    before = copy.deepcopy(student.state_dict())
    run_steps(evaluator_for(teacher), student, 3)
    assert "There is no loss" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_the_learning_rate_follows_the_cosine_over_the_steps_asked_for(teacher, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def noting(self, *arguments, **keywords):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    run_steps(evaluator_for(teacher, pseudo_labels=True), lenet5_half(), 12)
    assert rates[0] == pytest.approx(0.5e-3) and max(rates) == pytest.approx(1e-3)
    assert len(rates) == 12 and rates[-1] < 0.1e-3


def test_the_users_own_optimiser_and_schedule_are_used(teacher, monkeypatch):
    student = lenet5_half()
    optimizer = nni.trace(torch.optim.SGD)(student.parameters(), lr=0.25)
    schedule = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 2, gamma=0.5)
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    evaluator = evaluator_for(teacher, pseudo_labels=True, optimizers=optimizer, lr_schedulers=schedule)
    run_steps(evaluator, student, 5)
    assert rates == [0.25, 0.25, 0.125, 0.125, 0.0625]


def test_mistakes_are_told(teacher):
    student = lenet5_half()
    optimizer = nni.trace(torch.optim.SGD)(student.parameters(), lr=0.25)
    schedule = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 2)
    with pytest.raises(UserError, match="one optimiser"):
        evaluator_for(teacher, optimizers=[optimizer, optimizer])
    with pytest.raises(UserError, match="without its optimizer"):
        evaluator_for(teacher, lr_schedulers=schedule)
    with pytest.raises(UserError, match="calibration_images"):
        evaluator_for(teacher, calibration_images=0)
    with pytest.raises(UserError, match="requires_grad"):
        run_steps(evaluator_for(teacher), lenet5_half().requires_grad_(False), 1)


def test_the_calibration_set_is_as_large_as_asked_and_its_ranges_are_those_of_ptq(teacher):
    evaluator = evaluator_for(teacher, calibration_images=70)
    assert len(evaluator.calibration_set()) == 70
    assert len(evaluator_for(teacher).calibration_set()) == 256
    assert len(evaluator_for(teacher, source=NoiseSource(SPEC, 50), calibration_images=120).calibration_set()) == 120
    quantizer = PtqQuantizer(copy.deepcopy(teacher.model).requires_grad_(True), int8(), evaluator)
    before = copy.deepcopy(teacher.model.state_dict())
    student, calibration = quantizer.compress(0, None)
    seen = evaluator.calibration_set()
    assert calibration["conv1"]["_input_0"]["tracked_max"].item() == seen.max().item()
    assert calibration["conv1"]["_input_0"]["tracked_min"].item() == seen.min().item()
    assert evaluator.evaluating_func(student) > 0.9
    quantizer.unwrap_model()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_agreement_is_1_with_the_teacher_itself(teacher):
    evaluator = evaluator_for(teacher)
    assert evaluator.evaluating_func(teacher.model) == 1.0
    assert evaluator.evaluating_func(lenet5_half().train()) < 0.9


@pytest.mark.parametrize("pruner_class", [L1NormPruner, L2NormPruner, FPGMPruner, LevelPruner])
def test_pruners_that_look_at_weights(teacher, pruner_class):
    _, masks = pruner_class(lenet5(), HALF, evaluator_for(teacher)).compress()
    assert [masks[path]["weight"].mean().item() for path in ("conv1", "conv2")] == [0.5, 0.5]


@pytest.mark.parametrize("network", [lenet5, NormNet])
@pytest.mark.parametrize(
    ("pruner_class", "options", "steps"),
    [
        (TaylorPruner, {"training_steps": 4}, ()),
        (SlimPruner, {"training_steps": 4}, ()),
        (MovementPruner, {"warmup_step": 2, "cooldown_begin_step": 8}, (10, None)),
    ],
)
def test_pruners_that_train(teacher, network, pruner_class, options, steps):
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}] if network is NormNet and not steps else HALF
    pruner = pruner_class(network(), config, evaluator_for(teacher, pseudo_labels=True), **options)
    _, masks = pruner.compress(*steps)
    assert len(masks) == 2 and all(mask["weight"].mean().item() == 0.5 for mask in masks.values())


@pytest.mark.parametrize("network", [lenet5, NormNet])
@pytest.mark.parametrize("pruner_class", [TaylorPruner, SlimPruner])
@pytest.mark.parametrize("own_optimiser", [False, True])
def test_scoring_moves_nothing_unless_asked_to(teacher, network, pruner_class, own_optimiser):
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}] if network is NormNet else HALF
    moved = []
    for train in (False, True):
        student = network()
        before = copy.deepcopy(student.state_dict())
        optimizer = nni.trace(torch.optim.SGD)(student.parameters(), lr=0.1, momentum=0.9) if own_optimiser else None
        options = {"train_while_scoring": train, "optimizers": optimizer}
        pruner = pruner_class(student, config, evaluator_for(teacher, pseudo_labels=True, **options), training_steps=3)
        pruner.compress()
        pruner.unwrap_model()
        after = student.state_dict()
        assert after.keys() == before.keys()
        moved.append(any(not torch.equal(value, before[name]) for name, value in after.items()))
    assert moved == [False, True]


def test_scores_are_those_of_weights_at_rest(teacher):
    masks = []
    for resting in (False, True):
        torch.manual_seed(7)
        student = NormNet()
        optimizer = nni.trace(torch.optim.SGD)(student.parameters(), lr=0.0) if resting else None
        options = {"optimizers": optimizer, "train_while_scoring": resting}
        pruner = TaylorPruner(student, HALF, evaluator_for(teacher, pseudo_labels=True, **options), training_steps=5)
        masks.append(pruner.compress()[1])
    for path, targets in masks[0].items():
        assert torch.equal(targets["weight"], masks[1][path]["weight"])


@pytest.mark.parametrize("schedule", [AGPPruner, LinearPruner])
def test_scheduled_pruners(teacher, schedule):
    pruner = schedule(L1NormPruner(lenet5(), HALF, evaluator_for(teacher, pseudo_labels=True)), 2, 3)
    _, masks = pruner.compress(8, None)
    assert masks["conv1"]["weight"].mean().item() == masks["conv2"]["weight"].mean().item() == 0.5


@pytest.mark.parametrize(
    ("quantizer_class", "config"),
    [
        (PtqQuantizer, int8()),
        (QATQuantizer, int8()),
        (LsqQuantizer, int8(scheme="symmetric")),
        (LsqPlusQuantizer, int8("uint8")),
        (
            DoReFaQuantizer,
            [{"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "int8", "quant_scheme": "affine"}],
        ),
        (BNNQuantizer, [{"op_names": ["fc1"], "target_names": ["weight"], "quant_dtype": None}]),
    ],
)
def test_quantizers(teacher, quantizer_class, config):
    student, calibration = quantizer_class(lenet5(), config, evaluator_for(teacher, pseudo_labels=True)).compress(
        6, None
    )
    assert calibration and all(
        torch.isfinite(target["scale"]).all() and (target["scale"] > 0).all()
        for targets in calibration.values()
        for target in targets.values()
    )
    assert torch.isfinite(student(images(2))).all()


def fused(kind: str, teacher: Teacher, evaluator: DataFreeEvaluator) -> ZeroShotDistiller:
    torch.manual_seed(3)
    student = NormNet() if kind == "folded" else lenet5()
    if kind == "l1":
        below = L1NormPruner(student, HALF, evaluator)
        below.compress()
    elif kind == "agp":
        below = AGPPruner(L1NormPruner(student, HALF, evaluator), 3, 5)
    elif kind == "agp taylor":
        below = AGPPruner(TaylorPruner(student, HALF, evaluator, training_steps=2), 4, 4)
    elif kind == "taylor":
        below = TaylorPruner(student, HALF, evaluator, training_steps=15)
    elif kind == "slim":
        below = SlimPruner(student, HALF, evaluator, training_steps=15)
    elif kind == "movement":
        below = MovementPruner(student, HALF, evaluator, warmup_step=3, cooldown_begin_step=15)
    elif kind == "late qat":
        below = QATQuantizer(student, int8(), evaluator, quant_start_step=5)
    elif kind == "folded":
        below = QATQuantizer(student, FOLDED, evaluator)
    elif kind == "lsq":
        below = LsqQuantizer(student, int8(scheme="symmetric"), evaluator)
    elif kind == "lsq plus":
        below = LsqPlusQuantizer(student, int8("uint8"), evaluator)
    elif kind == "agp and qat":
        below = QATQuantizer.from_compressor(AGPPruner(L1NormPruner(student, HALF, evaluator), 3, 5), int8())
    else:
        below = QATQuantizer(student, int8(), evaluator)
    return ZeroShotDistiller.from_compressor(below, [], teacher)


def final_state(kind: str, teacher: Teacher, checkpoint: Path | None = None) -> dict[str, Tensor]:
    distiller = fused(kind, teacher, evaluator_for(teacher, checkpoint=checkpoint))
    student = distiller.compress(20, None)
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


KINDS = ["l1", "agp", "agp taylor", "taylor", "slim", "movement", "qat", "late qat", "folded", "lsq", "lsq plus"]


@pytest.mark.parametrize("kind", [*KINDS, "agp and qat"])
def test_a_resumed_fused_run_ends_bit_for_bit_as_an_undisturbed_one(teacher, kind, tmp_path, monkeypatch):
    undisturbed = final_state(kind, teacher)
    path = tmp_path / "state.pt"
    steps = []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 8:
            raise signals.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(signals, "check", stop)
    with pytest.raises(signals.Interrupted):
        final_state(kind, teacher, path)
    assert path.is_file()
    resumed = final_state(kind, teacher, path)
    assert len(steps) == 20, "the second run takes the 12 remaining steps"
    finished = final_state(kind, teacher, path)
    assert len(steps) == 20, "a third run has none left"
    for state in (resumed, finished):
        assert state.keys() == undisturbed.keys()
        assert [name for name, value in state.items() if not torch.equal(value, undisturbed[name])] == []


def test_nnis_adaptive_distiller_resumes_too(teacher, tmp_path, monkeypatch):
    def run(checkpoint: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(4)
        evaluator = evaluator_for(teacher, checkpoint=checkpoint)
        config = [{"op_names": ["flatten"], "lambda": 1.0}]
        predict = lambda batch, network: network(batch)  # noqa: E731
        student = lenet5_half()
        distiller = Adaptive1dLayerwiseDistiller(
            student, config, evaluator, copy.deepcopy(teacher.model), predict, origin_loss_lambda=1.0
        )
        distiller.track_forward(SPEC.normalise(images(2)))
        distiller.compress(10, None)
        linear = distiller.trans_linears["flatten"]["_output_0"]
        return {**student.state_dict(), "linear": linear.weight.detach()}

    undisturbed = run(None)
    steps = []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 4:
            raise signals.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(signals, "check", stop)
    with pytest.raises(signals.Interrupted):
        run(tmp_path / "state.pt")
    resumed = run(tmp_path / "state.pt")
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_a_checkpoint_of_another_compression_is_refused(teacher, tmp_path):
    path = tmp_path / "state.pt"
    fused("agp", teacher, evaluator_for(teacher, checkpoint=path)).compress(16, None)
    with pytest.raises(UserError, match="another run"):
        fused("qat", teacher, evaluator_for(teacher, checkpoint=path)).compress(16, None)
    with pytest.raises(UserError, match="another run"):
        fused("agp", teacher, evaluator_for(teacher, checkpoint=path)).compress(17, None)
    hotter = fused("agp", teacher, evaluator_for(teacher, checkpoint=path))
    hotter.temperature = 21.0
    with pytest.raises(UserError, match="another run"):
        hotter.compress(16, None)


def test_a_second_training_keeps_its_own_checkpoint(teacher, tmp_path):
    path = tmp_path / "state.pt"
    evaluator = evaluator_for(teacher, checkpoint=path)
    student = lenet5()
    pruner = AGPPruner(L1NormPruner(student, HALF, evaluator), 2, 3)
    distiller = ZeroShotDistiller.from_compressor(pruner, [], teacher)
    distiller.compress(6, None)
    distiller.unwrap_model()
    ZeroShotDistiller(student, [], evaluator, teacher).compress(5, None)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["state-2.pt", "state.pt"]
    assert [history.steps for history in evaluator.histories] == [[6], [5]]
