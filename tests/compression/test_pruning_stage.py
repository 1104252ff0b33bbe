"""Every pruner of NNI as a stage of a recipe: masks from weights or impressions, trained under, shrunk."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digits_network
from torch import Tensor, nn

from zskd_nni.compression import fx_trace
from zskd_nni.compression.fuse import check_distiller
from zskd_nni.compression.nni_config import modern_config_list
from zskd_nni.compression.pruning.dependency_config import PruningPlan
from zskd_nni.compression.pruning.nni_pruner import default_arguments, pruning_plan
from zskd_nni.compression.pruning.prune import PrunedNetwork, check_pruning, one_shot_masks, prune, shrink_to_masks
from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.datasets import load_images
from zskd_nni.data.sources import NoiseSource, StoredSource
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import alexnet
from zskd_nni.pipeline import Run
from zskd_nni.recipes.compression_config import CompressionRun, DistillerConfig, PruningConfig
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import SynthesisSettings, synthesize
from zskd_nni.training.distillation import DistillationSettings

SPEC = InputSpec((1, 32, 32))
SETTINGS = DistillationSettings(
    temperature=4, steps=40, batch=64, warmup=5, augmentation=Augmentation(rotation=5, translation=0.05)
)
HALF = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}]


class NormNet(nn.Module):
    """Channels whose batch normalisation tells at once how much they matter: every second one hardly does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.relu = nn.Conv2d(1, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(4), nn.Linear(128, 10)
        with torch.no_grad():
            self.head.weight.mul_(4)
            self.head.weight[:, torch.arange(128) // 16 % 2 == 1] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.relu(self.norm(self.conv(x)))).flatten(1))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(digits_network(), SPEC)


@pytest.fixture(scope="module")
def source(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> StoredSource:
    store = synthesize(
        teacher,
        ZskdTargets(teacher, ZskdSettings()),
        SynthesisSettings(max_steps=25, learning_rate=0.05),
        size=200,
        seed=0,
        folder=tmp_path_factory.mktemp("impressions"),
        quiet=True,
    )
    return StoredSource(store.images(), 64, 0, store.fingerprint)


def pruned(teacher: Teacher, given: Any, tmp_path: Path, scores: Any = None, **section: Any) -> PrunedNetwork:
    distiller = section.pop("distiller", None)
    return prune(
        copy.deepcopy(teacher.model).requires_grad_(True),
        PruningConfig(**{"config_list": HALF, "steps": 30, **section}),
        teacher,
        scores if given is None else given,
        SETTINGS,
        train=given is not None,
        run=CompressionRun(checkpoint=tmp_path / "checkpoint", distiller=distiller, quiet=True),
    )


def check(teacher: Teacher, config: PruningConfig, steps: int | None = None) -> None:
    check_pruning(teacher.model, config, pruning_plan(teacher.model, config, teacher), teacher, steps)


def masks_of(network: nn.Module, config: PruningConfig, teacher: Teacher, images: Any) -> Any:
    plan = pruning_plan(network, config, teacher)
    return one_shot_masks(network, config, plan, teacher, images, SETTINGS, CompressionRun(quiet=True))


@torch.no_grad()
def right(network: nn.Module) -> float:
    data = load_images("digits", "test")
    return (network(SPEC.normalise(data.pixels(slice(None), SPEC))).argmax(1) == data.labels).float().mean().item()


SCHEDULES = [None, "AGPPruner", "LinearPruner"]
STRUCTURED = [
    *(("L1NormPruner", schedule) for schedule in SCHEDULES),
    ("L2NormPruner", None),
    ("FPGMPruner", None),
    ("FPGMPruner", "AGPPruner"),
    ("TaylorPruner", None),
    ("TaylorPruner", "LinearPruner"),
    ("MovementPruner", None),
]


@pytest.mark.parametrize(("pruner", "schedule"), STRUCTURED)
def test_structured_pruners_end_in_a_smaller_network(teacher, source, tmp_path, pruner, schedule):
    section = {} if schedule is None else {"schedule": {"name": schedule, "interval": 5, "total_times": 4}}
    result = pruned(teacher, source, tmp_path, pruner=pruner, **section)
    assert (result.network.conv1.out_channels, result.network.conv2.out_channels) == (3, 8)
    assert result.record["shrunk"] and result.record["max_logit_difference"] <= 1e-4
    assert result.record["parameters_after"] == 35820
    assert set(result.kept) >= {"conv1", "conv2"}
    assert right(result.network) > 0.6


def test_taylor_finds_the_channels_that_matter_and_leaves_the_weights(source, tmp_path):
    teacher = Teacher(NormNet(), SPEC)
    network = copy.deepcopy(teacher.model).requires_grad_(True)
    before = copy.deepcopy(network.state_dict())
    section = PruningConfig(pruner="TaylorPruner", config_list=[{"op_names": ["conv"], "sparse_ratio": 0.5}], steps=20)
    masks = masks_of(network, section, teacher, source)
    kept = masks["conv"]["weight"].flatten(1).any(1).nonzero().flatten().tolist()
    assert kept == [0, 2, 4, 6]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(hasattr(module, "_nni_wrapper") for module in network.modules())


def test_slim_prunes_behind_a_normalisation(source, tmp_path):
    teacher = Teacher(NormNet(), SPEC)
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
    result = pruned(teacher, source, tmp_path, pruner="SlimPruner", config_list=config, steps=60)
    assert result.network.conv.out_channels == 4 and result.network.norm.num_features == 4
    assert result.record["parameters_after"] < result.record["parameters_before"]


def test_slim_under_a_schedule_leaves_its_scales_in_the_weights(source, tmp_path):
    teacher = Teacher(NormNet(), SPEC)
    config = [{"op_names": ["conv"], "sparse_ratio": 0.5}]
    schedule = {"name": "AGPPruner", "interval": 5, "total_times": 4}
    result = pruned(teacher, source, tmp_path, pruner="SlimPruner", config_list=config, schedule=schedule, steps=40)
    assert result.network.conv.out_channels == 4


def test_slim_without_batch_normalisation_says_why(teacher):
    section = PruningConfig(pruner="SlimPruner", config_list=HALF)
    with pytest.raises(UserError, match="batch normalisation, and LeNet5 has none; use TaylorPruner"):
        check(teacher, section)


@pytest.mark.parametrize(
    ("pruner", "config"),
    [
        ("LevelPruner", HALF),
        ("MovementPruner", [{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [1, 1]}]),
    ],
)
def test_masks_of_single_weights_are_multiplied_in_and_the_sparsity_is_told(teacher, source, tmp_path, pruner, config):
    result = pruned(teacher, source, tmp_path, pruner=pruner, config_list=config)
    name = config[0]["op_names"][-1]
    weight = result.network.get_submodule(name).weight
    zeros = (weight == 0).float().mean().item()
    # Movement's scores of weights behind dead units are equal, and NNI keeps equals.
    assert zeros == pytest.approx(0.5, abs=0.02 if pruner == "LevelPruner" else 0.15)
    assert result.record["zeros"] == pytest.approx(zeros, abs=0.02)
    if pruner == "LevelPruner":  # Movement may empty whole units, which then go
        assert not result.record["shrunk"] and "as large as before" in result.record["note"]
        assert sum(p.numel() for p in result.network.parameters()) == 61706


def test_without_speedup_nothing_is_removed_but_the_masks_are_in_the_weights(teacher, source, tmp_path):
    result = pruned(teacher, source, tmp_path, speedup=False)
    assert result.network.conv2.out_channels == 16
    assert (result.network.conv2.weight.flatten(1).abs().sum(1) == 0).sum() == 8
    assert result.record["zeros"] == 0.5 and "nothing was removed" in result.record["note"]


@pytest.mark.parametrize("pruner", ["L1NormPruner", "TaylorPruner", "MovementPruner"])
@pytest.mark.parametrize("schedule", [None, {"name": "AGPPruner", "interval": 5, "total_times": 4}])
def test_the_untrained_control_has_the_teachers_weights(teacher, source, tmp_path, pruner, schedule):
    if pruner == "MovementPruner" and schedule:
        pytest.skip("Movement has its own schedule")
    result = pruned(teacher, None, tmp_path, scores=source, pruner=pruner, schedule=schedule)
    kept = result.kept["conv1"].outputs
    assert torch.equal(result.network.conv1.weight, teacher.model.conv1.weight[kept])
    assert result.record["steps_under_masks"] == 0 and len(kept) == 3


def test_images_are_needed_where_channels_are_scored_on_them(teacher, tmp_path):
    with pytest.raises(UserError, match="TaylorPruner needs images"):
        pruned(teacher, None, tmp_path, pruner="TaylorPruner")


def test_scores_are_those_of_the_images_that_are_given(teacher, source):
    section = PruningConfig(pruner="TaylorPruner", config_list=HALF, steps=30)

    def kept(images: Any) -> list[int]:
        masks = masks_of(teacher.model.requires_grad_(True), section, teacher, images)
        return masks["conv2"]["weight"].flatten(1).any(1).nonzero().flatten().tolist()

    try:
        assert kept(source) == kept(source) != kept(NoiseSource(SPEC, 64))
    finally:
        teacher.model.requires_grad_(False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pruner": "TailorPruner"}, "did you mean TaylorPruner"),
        ({"pruner": "TaylorPruner", "arguments": {"training_step": 3}}, "refuses the config"),
        ({"pruner": "MovementPruner", "schedule": {"name": "AGPPruner", "interval": 1, "total_times": 2}}, "its own"),
        ({"config_list": [{"op_names": ["conv1"], "sparse_ration": 0.5}]}, "did you mean 'sparse_ratio'"),
        ({"config_list": [{"op_names": ["conv9"], "sparse_ratio": 0.5}]}, "conv9"),
        ({"pruner": "TaylorPruner", "arguments": {"training_steps": "many"}}, "training_steps must be a whole number"),
        ({"pruner": "TaylorPruner", "arguments": {"training_steps": 0}}, "at least 1, not 0"),
        (
            {
                "pruner": "TaylorPruner",
                "arguments": {"training_steps": 50},
                "schedule": {"name": "AGPPruner", "interval": 10, "total_times": 2},
            },
            "schedule.interval leaves it 10",
        ),
        (
            {"pruner": "MovementPruner", "steps": 40, "arguments": {"warmup_step": 4, "cooldown_begin_step": 60}},
            "reaches the sparsity at step 60, and trains for 40 steps",
        ),
        (
            {"pruner": "MovementPruner", "arguments": {"warmup_step": 9, "cooldown_begin_step": 9}},
            "warmup_step: 9 must be less than cooldown_begin_step",
        ),
        ({"pruner": "MovementPruner", "steps": 1}, "at least 2 steps"),
    ],
)
def test_mistakes_are_told_before_the_work(teacher, section, message):
    section = PruningConfig(**{"config_list": HALF, **section})
    with pytest.raises(UserError, match=message):
        check(teacher, section)


def test_a_recipe_is_planned_once(tmp_path, monkeypatch):
    calls = {"normalise": 0, "trace": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for module in [module for name, module in sys.modules.items() if name.startswith("zskd_nni.")]:
        if getattr(module, "modern_config_list", None) is modern_config_list:
            monkeypatch.setattr(module, "modern_config_list", counted("normalise", modern_config_list))
    monkeypatch.setattr(fx_trace, "record", counted("trace", fx_trace.record))
    small = [
        "evaluation=null",
        "transfer.size=40",
        "transfer.held_out=10",
        "transfer.synthesis.max_steps=2",
        "distillation.steps=2",
    ]
    loaded = load_recipe("mnist-prune50", [*small, "compression.pruning.steps=2", "distillation.batch=20"])
    report = Run(loaded, tmp_path / "out", quiet=True).compress()
    assert set(report["controls"]) == {"none", "noise"}
    assert 1 <= calls["normalise"] <= 3 and 1 <= calls["trace"] <= 3


class Padded(nn.Module):
    """Where the bias of a pruned convolution stays, the padding of the next one shows it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(8, 10)
        nn.init.constant_(self.conv1.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv2(self.relu(self.conv1(x)))).mean((2, 3)))


def test_what_cannot_be_shrunken_is_told_before_the_work():
    teacher, weight = Teacher(Padded(), SPEC), {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "target_names": ["weight"]}
    own = PruningConfig(config_list=[{**weight, "dependency_group_id": "mine"}])
    with pytest.raises(UserError, match=r"bias or BatchNorm .* exclude the layers in question") as refusal:
        check(teacher, own)
    assert "complete_config_list" not in str(refusal.value)
    check(teacher, replace(own, speedup=False))  # nothing is removed then
    check(teacher, PruningConfig([weight]))  # the bias goes with its weight


def test_nni_refusing_in_the_middle_of_a_run_is_a_sentence(teacher, source, tmp_path):
    with pytest.raises(UserError, match="NNI's TaylorPruner refuses the config"):
        pruned(teacher, source, tmp_path, pruner="TaylorPruner", arguments={"training_steps": "many"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"op_names": ["fc1"], "link": "nope"}, r"compression\.distiller: ZeroShotDistiller refuses the config .*nope"),
        ({"op_names": ["fc_1"]}, "entry 0 of the distiller config names 'fc_1' in op_names, .*the nearest is 'fc1'"),
        ({"op_types": ["Liner"]}, "names 'Liner' in op_types, .*the nearest is 'Linear'"),
        ({"op_names_re": ["("]}, r"compression\.distiller\.config_list\.0\.op_names_re: .*unterminated"),
        ({"op_names": ["fc1"], "target_settings": [1]}, r"config_list\.0\.target_settings must map targets"),
    ],
)
def test_what_our_distiller_cannot_take_is_a_sentence(teacher, config, message):
    with pytest.raises(UserError, match=message):
        check_distiller(teacher.model, DistillerConfig(config_list=[config]), teacher)


def test_of_a_fused_training_all_steps_count(teacher):
    late = {"pruner": "MovementPruner", "steps": 40, "arguments": {"warmup_step": 4, "cooldown_begin_step": 60}}
    section = PruningConfig(**{"config_list": HALF, **late})
    check(teacher, section, steps=60)
    with pytest.raises(UserError, match="trains for 50 steps"):
        check(teacher, section, steps=50)


def test_movement_reaches_its_sparsity_in_few_steps(teacher, source, tmp_path):
    result = pruned(teacher, source, tmp_path, pruner="MovementPruner", steps=10)
    assert (result.network.conv1.out_channels, result.network.conv2.out_channels) == (3, 8)


def test_single_weights_beside_removed_channels_are_told_apart(teacher):
    masks: dict[str, Any] = {"fc1": {"weight": torch.ones(120, 400)}, "fc2": {"weight": torch.ones(84, 120)}}
    masks["fc1"]["weight"][:10] = 0
    masks["fc1"]["bias"] = masks["fc1"]["weight"][:, 0].clone()
    masks["fc2"]["weight"][::2, ::3] = 0
    section = PruningConfig(config_list=[{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    result = shrink_to_masks(copy.deepcopy(teacher.model), masks, section, PruningPlan([]), teacher)
    assert result.network.fc1.out_features == 110
    assert list(result.masks) == ["fc2"] and list(result.masks["fc2"]) == ["weight"]
    assert torch.equal(result.masks["fc2"]["weight"], masks["fc2"]["weight"][:, 10:])


def test_sensible_arguments_follow_from_the_steps():
    def of(pruner: str, steps: int, **more: Any) -> dict[str, Any]:
        return default_arguments(PruningConfig(**dict(pruner=pruner, config_list=HALF, steps=steps, **more)))

    assert of("TaylorPruner", 0) == {"training_steps": 20}
    assert of("TaylorPruner", 5000) == {"training_steps": 100}
    assert of("TaylorPruner", 50, schedule={"name": "AGPPruner", "interval": 7, "total_times": 2}) == {
        "training_steps": 7
    }
    assert of("MovementPruner", 10)["cooldown_begin_step"] <= 10
    assert of("MovementPruner", 0)["cooldown_begin_step"] == 20  # steps of its own, for the scores
    movement = of("MovementPruner", 300)
    assert 0 < movement["warmup_step"] < movement["cooldown_begin_step"] < 300
    assert of("L1NormPruner", 100) == {}


@pytest.mark.parametrize("name", ["DynamicLayerwiseDistiller", "Adaptive1dLayerwiseDistiller"])
def test_nnis_own_distillers_learn_on_impressions(teacher, source, tmp_path, name):
    section = DistillerConfig(
        name=name, config_list=[{"op_names": ["fc3"], "target_names": ["_output_"], "lambda": 1, "apply_method": "mse"}]
    )
    untrained = pruned(teacher, None, tmp_path)
    trained = pruned(teacher, source, tmp_path, distiller=section, steps=60)
    assert right(trained.network) > right(untrained.network) + 0.01
    assert not any(hasattr(module, "_nni_wrapper") for module in teacher.model.modules())


def test_a_pruned_alexnet_loads_again_without_the_pruning_code(tmp_path):
    torch.manual_seed(0)
    spec = InputSpec((3, 32, 32))
    teacher = Teacher(alexnet(), spec)
    section = PruningConfig(config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], steps=0)
    result = prune(copy.deepcopy(teacher.model), section, teacher, None, SETTINGS)
    assert result.network.conv2.out_channels == 64
    files = tmp_path / "small.safetensors", tmp_path / "small.json"
    save_network(result.network, "zoo:alexnet", {}, *files)
    again = load_network(files[1])
    images = spec.normalise(torch.rand(4, 3, 32, 32))
    with torch.no_grad():
        assert torch.equal(again(images), result.network(images))
        assert type(again.norm1).__module__ == "zskd_nni.models.local_response_norm"
