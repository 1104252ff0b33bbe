from __future__ import annotations

import copy
import dataclasses
import importlib

import nni
import pytest
import torch
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, L1NormPruner, TaylorPruner
from nni.compression.quantization import QATQuantizer
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional

import zskd_nni.compression
from zskd_nni.compression import DataFreeEvaluator, ZeroShotDistiller
from zskd_nni.compression import distiller as distiller_module
from zskd_nni.compression.distiller import images_of
from zskd_nni.compression.pruning.prune import prune
from zskd_nni.compression.quantization.quantize import quantize
from zskd_nni.compression.quantization.stage import compress_in_one_training
from zskd_nni.data.sources import StoredSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5, lenet5_half
from zskd_nni.recipes.compression_config import CompressionRun, PruningConfig, QuantizationConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings

torch.set_num_threads(1)
SPEC = InputSpec((1, 32, 32), mean=(0.4,), std=(0.3,))
CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
INT8 = [
    {
        "op_types": ["Conv2d", "Linear"],
        "target_names": ["_input_", "weight"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
    }
]


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    network = lenet5()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # decided answers: an untrained network says the same to all
            layer.weight.data *= 2
    return Teacher(network, SPEC)


def images(count: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, 1, 8, 8), generator=generator)
    return functional.interpolate(coarse, size=32, mode="bilinear")


def evaluator_for(teacher: Teacher, **options) -> DataFreeEvaluator:
    settings = options.pop("settings", DistillationSettings(warmup=5, learning_rate=1e-3))
    return DataFreeEvaluator(teacher, StoredSource(images(), 32, 0, "coarse"), settings, quiet=True, **options)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def loss_of_one_step(distiller: ZeroShotDistiller, batch: object) -> Tensor:
    """What NNI would minimise on ``batch``, with everything a run patches in place."""
    evaluator = distiller.evaluator
    evaluator.bind_model(distiller.bound_model, distiller._get_param_names_map())
    for compressor in distiller.fused_compressors:
        compressor._fuse_preprocess(evaluator)
    try:
        return evaluator._training_step(batch, distiller.bound_model)
    finally:
        evaluator.unbind_model()


def test_it_stands_beside_nnis_own_distillers():
    nnis = importlib.import_module("nni.compression.distillation")
    assert nnis.ZeroShotDistiller is zskd_nni.compression.ZeroShotDistiller
    assert issubclass(nnis.ZeroShotDistiller, importlib.import_module(nnis.__name__ + ".basic_distiller").Distiller)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_loss_is_the_divergence_of_the_logits_by_hand(teacher, temperature):
    student = lenet5_half()
    distiller = ZeroShotDistiller(student, [], evaluator_for(teacher), teacher, temperature=temperature)
    batch = SPEC.normalise(images(16))
    loss = loss_of_one_step(distiller, batch)
    with torch.no_grad():
        target = (teacher.model(batch) / temperature).softmax(1)
        answer = (student(batch) / temperature).log_softmax(1)
    by_hand = temperature**2 * (target * (target.log() - answer)).sum() / 16
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert by_hand > 1e-3


def test_one_temperature_for_distiller_pruning_and_quantization(teacher, monkeypatch):
    """Without a temperature of its own every distillation takes that of the evaluator's settings."""
    seen = []

    def noting(student, answers, temperature):
        seen.append(temperature)
        return functional.mse_loss(student, answers)

    monkeypatch.setattr(distiller_module, "distillation_loss", noting)
    source, settings = StoredSource(images(), 32, 0, "coarse"), DistillationSettings(temperature=4.0, warmup=0)
    student, evaluator = lenet5_half(), evaluator_for(teacher, settings=settings)
    ZeroShotDistiller(student, [], evaluator, teacher).compress(2, None)
    pruner = L1NormPruner(lenet5(), CONVOLUTIONS, evaluator_for(teacher, settings=settings))
    pruner.compress()
    ZeroShotDistiller.from_compressor(pruner, [], teacher).compress(2, None)
    run = CompressionRun(quiet=True)
    prune(teacher.student(), PruningConfig(CONVOLUTIONS, steps=2), teacher, source, settings, run=run)
    qat = QuantizationConfig(INT8, quantizer="QATQuantizer", steps=2)
    quantize(teacher.student(), qat, teacher, source, settings, run=run)
    fused = QuantizationConfig(INT8, quantizer="QATQuantizer", steps=1)
    both = PruningConfig(CONVOLUTIONS, steps=1)
    short = dataclasses.replace(settings, steps=1)
    compress_in_one_training(teacher.student(), both, fused, teacher, source, short, run=run)
    assert seen == [4.0] * 11


def test_the_default_temperature_is_that_of_the_settings(teacher):
    assert ZeroShotDistiller(lenet5(), [], evaluator_for(teacher), teacher).temperature == 20.0
    optimizer = nni.trace(torch.optim.SGD)((student := lenet5()).parameters(), lr=0.1)
    nnis = TorchEvaluator(lambda *_: None, optimizer, lambda *_: None)
    assert ZeroShotDistiller(student, [], nnis, teacher).temperature == DistillationSettings().temperature
    assert ZeroShotDistiller(lenet5(), [], evaluator_for(teacher), teacher, temperature=3).temperature == 3.0


@pytest.mark.parametrize("as_module", [False, True])
def test_the_teacher_comes_out_as_it_went_in(teacher, as_module):
    network = copy.deepcopy(teacher.model).train().requires_grad_(True)
    before = weights_of(network), weights_of(teacher.model)
    student = lenet5_half()
    started = weights_of(student)
    distiller = ZeroShotDistiller(student, [], evaluator_for(teacher), network if as_module else teacher)
    assert distiller.compress(5, None) is student
    distiller.unwrap_model()
    assert same(before[0], weights_of(network)) and same(before[1], weights_of(teacher.model))
    assert network.training and all(weight.requires_grad for weight in network.parameters())
    assert not any(hasattr(module, "_nni_wrapper") for net in (network, teacher.model) for module in net.modules())
    assert not same(started, weights_of(student))
    assert started.keys() == student.state_dict().keys()


def test_hooks_and_patches_are_gone_after_a_run_and_after_a_failed_one(teacher):
    student = lenet5_half()
    evaluator = evaluator_for(teacher)
    distiller = ZeroShotDistiller(student, [], evaluator, teacher)
    distiller.compress(2, None)
    assert not student._forward_hooks and evaluator.model is None

    def broken(batch, network):
        raise RuntimeError("no answer today")

    broken_one = ZeroShotDistiller(student, [], evaluator, teacher, broken)
    with pytest.raises(RuntimeError, match="no answer today"):
        broken_one.compress(2, None)
    assert not student._forward_hooks and evaluator.model is None
    assert evaluator._training_step == evaluator._ori_training_step


def test_agreement_rises_with_training(teacher):
    torch.manual_seed(1)
    student = lenet5_half()
    evaluator = evaluator_for(teacher)
    before = evaluator.evaluating_func(student)
    ZeroShotDistiller(student, [], evaluator, teacher, temperature=4.0).compress(None, 25)
    after = evaluator.evaluating_func(student)
    assert len(evaluator.histories) == 1 and evaluator.histories[0].steps[-1] == 25 * 8
    assert evaluator.histories[0].losses[-1] < 0.5 * evaluator.histories[0].losses[0]
    assert after > before + 0.3 and after > 0.7


@pytest.mark.parametrize("kind", ["l1", "agp", "taylor"])
def test_fused_with_a_pruner_the_masked_weights_stay_masked(teacher, kind):
    student = lenet5()
    evaluator = evaluator_for(teacher)
    if kind == "l1":
        pruner = L1NormPruner(student, CONVOLUTIONS, evaluator)
        pruner.compress()
    elif kind == "agp":
        pruner = AGPPruner(L1NormPruner(student, CONVOLUTIONS, evaluator), interval_steps=2, total_times=4)
    else:
        pruner = TaylorPruner(student, CONVOLUTIONS, evaluator, training_steps=4)
    distiller = ZeroShotDistiller.from_compressor(pruner, [], teacher)
    distiller.compress(10, None)
    masks = pruner.get_masks()
    kept = {path: mask["weight"].flatten(1).any(1).float().mean().item() for path, mask in masks.items()}
    assert kept == {"conv1": 0.5, "conv2": 0.5}
    answer = student(images(4))
    distiller.unwrap_model()
    with torch.no_grad():
        for path, mask in masks.items():
            for name, value in mask.items():
                getattr(student.get_submodule(path), name).mul_(value)
    torch.testing.assert_close(answer, student(images(4)))


def test_a_norm_pruner_that_will_make_no_masks_is_told(teacher, caplog):
    for first in (False, True):
        caplog.clear()
        pruner = L1NormPruner(lenet5(), CONVOLUTIONS, evaluator_for(teacher))
        if first:
            pruner.compress()
        ZeroShotDistiller.from_compressor(pruner, [], teacher).compress(1, None)
        assert ("has made no masks" in caplog.text) is not first


def test_taylor_measures_with_the_distillation_loss(teacher, monkeypatch):
    pruner = TaylorPruner(lenet5(), CONVOLUTIONS, evaluator_for(teacher), training_steps=3)
    scores = {}
    monkeypatch.setattr(pruner, "_generate_sparsity", lambda metrics: scores.update(metrics) or {})
    ZeroShotDistiller.from_compressor(pruner, [], teacher).compress(3, None)
    assert all(score["weight"].min() > 0 for score in scores.values()) and set(scores) == {"conv1", "conv2"}


def test_fused_with_a_quantizer_the_student_is_trained_under_quantization(teacher):
    torch.manual_seed(2)
    student = lenet5()
    evaluator = evaluator_for(teacher)
    quantizer = QATQuantizer(student, INT8, evaluator)
    distiller = ZeroShotDistiller.from_compressor(quantizer, [], teacher, temperature=4.0)
    distiller.compress(30, None)
    simulated = student(images(8))
    calibration = quantizer.get_calibration_config()
    scale, zero = (calibration["conv1"]["weight"][key] for key in ("scale", "zero_point"))
    distiller.unwrap_model()
    with torch.no_grad():
        levels = torch.round(student.conv1.weight / scale + zero)
    # the ranges follow the weights as a moving average, so that a few weights lie just outside
    assert (levels.abs() <= 127).float().mean() > 0.9 and len(levels.unique()) > 20
    assert 0 < (simulated - student(images(8))).abs().max() < 1.0


def test_a_folded_convolution_with_a_bias_can_be_inherited(teacher):
    student = nn.Sequential()
    for name, layer in [("conv", nn.Conv2d(1, 4, 5)), ("norm", nn.BatchNorm2d(4)), ("act", nn.ReLU())]:
        student.add_module(name, layer)
    student.add_module("pool", nn.AdaptiveAvgPool2d(4))
    student.add_module("flat", nn.Flatten())
    student.add_module("head", nn.Linear(64, 10))
    config = [
        {
            "op_names": ["conv"],
            "target_names": ["weight", "_output_"],
            "quant_dtype": "int8",
            "quant_scheme": "affine",
            "fuse_names": [("conv", "norm", "act")],
        }
    ]
    names = set(dict(student.named_parameters()))
    before = student.conv.bias.detach().clone()
    quantizer = QATQuantizer(student, config, evaluator_for(teacher))
    distiller = ZeroShotDistiller.from_compressor(quantizer, [], teacher)
    distiller.compress(5, None)
    distiller.unwrap_model()
    assert set(dict(student.named_parameters())) == names
    assert not torch.equal(before, student.conv.bias)


def test_no_parameter_is_optimised_twice(teacher):
    student = nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)
    )
    config = [{"op_names": ["0"], "target_names": ["weight"], "quant_dtype": "int8", "fuse_names": [("0", "1")]}]
    evaluator = evaluator_for(teacher)
    quantizer = QATQuantizer(student, config, evaluator)
    evaluator.bind_model(student, quantizer._get_param_names_map())
    quantizer._fuse_preprocess(evaluator)
    trained = [id(weight) for group in evaluator._optimizers[0].param_groups for weight in group["params"]]
    assert len(trained) == len(set(trained)) == 6


def test_layerwise_targets_are_nnis(teacher):
    """With mse targets the loss is what NNI's own layer-wise distiller computes."""
    config = [{"op_names": ["conv2", "fc1"], "lambda": 0.7}, {"op_names": ["fc3"], "lambda": 2, "apply_method": "mse"}]
    nnis_config = copy.deepcopy(config)
    nnis_config[1]["lambda"] = 2.0
    torch.manual_seed(3)
    student = lenet5()
    batch = SPEC.normalise(images(8))
    ours = loss_of_one_step(ZeroShotDistiller(copy.deepcopy(student), config, evaluator_for(teacher), teacher), batch)
    nnis = DynamicLayerwiseDistiller(
        student,
        nnis_config,
        evaluator_for(teacher),
        copy.deepcopy(teacher.model),
        lambda batch, model: model(batch),
        0.0,
    )
    theirs = loss_of_one_step(nnis, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert theirs > 1e-3


def test_a_kl_target_takes_its_own_temperature(teacher):
    batch = SPEC.normalise(images(8))
    student = lenet5()
    losses = {}
    for own in (None, 2.0, 5):
        config = [{"op_names": ["fc3"], "apply_method": "kl", **({} if own is None else {"temperature": own})}]
        distiller = ZeroShotDistiller(copy.deepcopy(student), config, evaluator_for(teacher), teacher, temperature=9.0)
        losses[own] = loss_of_one_step(distiller, batch).item()
    with torch.no_grad():
        logits, target = student(batch), teacher.model(batch)
    for own, temperature in ((None, 9.0), (2.0, 2.0), (5, 5.0)):
        by_hand = temperature**2 * functional.kl_div(
            (logits / temperature).log_softmax(1), (target / temperature).softmax(1), reduction="batchmean"
        )
        assert losses[own] == pytest.approx(by_hand.item(), rel=1e-3)


def test_a_nested_temperature_and_link_are_taken(teacher):
    settings = {"_output_": {"apply_method": "kl", "temperature": 3, "link": "fc3", "lambda": 1}}
    config = [{"op_names": ["fc3"], "target_names": ["_output_"], "target_settings": settings}]
    distiller = ZeroShotDistiller(lenet5(), config, evaluator_for(teacher), teacher)
    space = distiller._target_spaces["fc3"]["_output_0"]
    assert space.setting["temperature"] == 3.0 and space.lambda_ == 1.0 and space.link == ["fc3"]


def test_the_layerwise_teacher_is_wrapped_in_a_copy(teacher):
    distiller = ZeroShotDistiller(lenet5(), [{"op_names": ["fc3"]}], evaluator_for(teacher), teacher)
    assert distiller.teacher_model is not teacher.model
    assert not any(hasattr(module, "_nni_wrapper") for module in teacher.model.modules())


def test_the_original_loss_counts_as_much_as_it_should(teacher):
    batch = SPEC.normalise(images(8))
    student = lenet5_half()
    losses = [
        loss_of_one_step(
            ZeroShotDistiller(
                student,
                [],
                evaluator_for(teacher, pseudo_labels=True),
                teacher,
                origin_loss_lambda=weight,
                temperature=4,
            ),
            batch,
        ).item()
        for weight in (0.0, 0.5)
    ]
    with torch.no_grad():
        hard = functional.cross_entropy(student(batch), teacher.model(batch).argmax(1)).item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * hard, rel=1e-3)


@pytest.mark.parametrize("origin", [None, (None, "aux"), float("nan"), {"nothing": 1}])
def test_a_useless_original_loss_cannot_leak_in(teacher, origin):
    def step(batch, model):
        model(batch[0])
        return torch.tensor(origin) if isinstance(origin, float) else origin

    seen = []

    def train(model, optimizer, training_step, schedulers, max_steps, max_epochs):
        for _ in range(max_steps):
            loss = training_step((SPEC.normalise(images(64)), None), model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())

    student = lenet5_half()
    optimizer = nni.trace(torch.optim.Adam)(student.parameters(), lr=1e-3)
    distiller = ZeroShotDistiller(student, [], TorchEvaluator(train, optimizer, step), teacher)
    distiller.compress(6, None)
    assert len(seen) == 6 and all(value == value for value in seen) and seen[-1] < seen[0]


def test_images_are_found_in_every_usual_batch():
    wanted = torch.rand(2, 1, 4, 4)
    other = torch.zeros(2)
    for batch in (wanted, (wanted, other), [wanted], {"x": wanted}, {"labels": other, "pixel_values": wanted}):
        assert images_of(batch) is wanted
    for batch in ("text", {"other": wanted}, (), 3):
        with pytest.raises(UserError, match="teacher_predict"):
            images_of(batch)


def test_outputs_may_be_mappings_and_tuples(teacher):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = lenet5_half()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x, "logits": self.net(x)}

    student = Wrapped()
    before = weights_of(student)
    ZeroShotDistiller(student, [], evaluator_for(teacher), teacher).compress(2, None)
    assert not same(before, weights_of(student))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": 0}, "temperature must be a positive number, not 0"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"config_list": [{"op_names": ["fc3"], "lamda": 1.0}]}, "'lamda'; the nearest is 'lambda'"),
        (
            {"config_list": [{"op_names": ["fc3"], "target_settings": {"_output_": {"temprature": 1.0}}}]},
            r"target_settings._output_ has no key 'temprature'; the nearest is 'temperature'",
        ),
        ({"config_list": [{"op_names": ["fc3"], "apply_method": "mae"}]}, "not valid"),
        ({"config_list": [{"op_names": ["fc3"], "temperature": -1}]}, "positive number, not -1"),
        ({"model": lenet5(7)}, "has 7 classes, the teacher 10"),
        ({"evaluator": None}, "needs an evaluator"),
    ],
)
def test_mistakes_are_told(teacher, change, sentence):
    arguments = {
        "model": lenet5_half(),
        "config_list": [],
        "evaluator": evaluator_for(teacher),
        "teacher_model": teacher,
        **change,
    }
    with pytest.raises(UserError, match=sentence):
        ZeroShotDistiller(**arguments)


def test_the_teacher_may_not_be_the_student(teacher):
    for given in (teacher, teacher.model):
        with pytest.raises(UserError, match="student itself"):
            ZeroShotDistiller(teacher.model, [], evaluator_for(teacher), given)


def test_another_number_of_classes_is_told_for_a_plain_module_too(teacher):
    with pytest.raises(UserError, match="classes"):
        ZeroShotDistiller(lenet5_half(), [], evaluator_for(teacher), lenet5(5))


def test_linked_layers_of_another_width_are_told(teacher):
    distiller = ZeroShotDistiller(lenet5_half(), [{"op_names": ["conv1"]}], evaluator_for(teacher), teacher)
    with pytest.raises(UserError, match="conv1 ~ conv1"):
        distiller.compress(1, None)


def test_a_limit_is_needed(teacher):
    with pytest.raises(UserError, match="max_steps or max_epochs"):
        ZeroShotDistiller(lenet5_half(), [], evaluator_for(teacher), teacher).compress(None, None)
