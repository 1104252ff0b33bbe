"""The teacher is a copy: what the user gave stays as it is, and the classifier is found."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from helpers import SMALL, random, small_network, small_teacher
from torch import Tensor, nn
from torchvision.transforms import v2

from zskd_nni.data.sources import NoiseSource
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models import onnx_export, zoo
from zskd_nni.models.hooks import recording_outputs
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import export_onnx, onnx_bytes, run_onnx
from zskd_nni.models.onnx_session import onnx_session
from zskd_nni.models.teacher import Teacher, classifier_candidates, first_tensor, load_teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import SynthesisSettings, synthesize
from zskd_nni.training.distillation import DistillationSettings, distill

GREY, COLOUR = InputSpec((1, 32, 32)), InputSpec((3, 32, 32))


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything of a module that must not change, bit by bit."""
    return {
        "tensors": {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()},
        "addresses": [p.data_ptr() for p in model.parameters()],
        "strides": [p.stride() for p in model.parameters()],
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: p.grad is None for name, p in model.named_parameters()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
    }


def assert_same_state(first: dict[str, object], second: dict[str, object]) -> None:
    for key in ("addresses", "strides", "training", "requires_grad", "grads", "hooks"):
        assert first[key] == second[key], key
    for name, (dtype, value) in first["tensors"].items():
        assert second["tensors"][name][0] == dtype
        assert torch.equal(second["tensors"][name][1], value), name


def test_the_users_module_is_left_alone(tmp_path) -> None:
    network = small_network().train()
    network.norm.eval()
    network.conv.weight.requires_grad_(False)
    calls: list[int] = []
    network.head.register_forward_hook(lambda *_: calls.append(1))
    before = state_of(network)
    teacher = Teacher(network, SMALL)
    teacher(torch.rand(4, 1, 8, 8))
    plan = ZskdTargets(teacher, ZskdSettings())
    synthesize(teacher, plan, SynthesisSettings(max_steps=3), size=10, seed=0, folder=tmp_path / "s", quiet=True)
    student = small_network(1)
    distill(student, teacher, NoiseSource(SMALL, 8), DistillationSettings(steps=3, batch=8), quiet=True)
    assert_same_state(before, state_of(network))


def test_synthesis_and_distillation_leave_the_copy_alone(tmp_path) -> None:
    teacher = small_teacher()
    before = state_of(teacher.model)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    plan = ZskdTargets(teacher, ZskdSettings())
    synthesize(teacher, plan, SynthesisSettings(max_steps=3), size=10, seed=0, folder=tmp_path / "s", quiet=True)
    distill(small_network(1), teacher, NoiseSource(SMALL, 8), DistillationSettings(steps=3, batch=8), quiet=True)
    assert_same_state(before, state_of(teacher.model))
    assert all(p.grad is None for p in teacher.model.parameters())


def test_later_changes_of_the_users_module_do_not_reach_the_copy() -> None:
    network = small_network().eval()
    teacher = Teacher(network, SMALL)
    images = torch.rand(3, 1, 8, 8)
    answers = teacher(images)
    with torch.no_grad():
        network.head.weight.zero_()
    network.train()
    assert torch.equal(teacher(images), answers)


# Finding the classifier.


@pytest.mark.parametrize(
    ("network", "path"),
    [
        (zoo.lenet5(), "fc3"),
        (zoo.lenet5_half(), "fc3"),
        (zoo.alexnet(), "fc8"),
        (zoo.alexnet_half(), "fc8"),
        (zoo.wrn(16, 1), "fc"),
    ],
)
def test_classifier_of_the_zoo(network: nn.Module, path: str) -> None:
    channels = next(network.parameters()).shape[1]
    teacher = Teacher(network, InputSpec((channels, 32, 32)))
    assert (teacher.classifier_path, teacher.num_classes) == (path, 10)
    assert torch.equal(teacher.class_weights(), getattr(network, path).weight)


@pytest.mark.parametrize(
    ("name", "path", "side"),
    [
        ("resnet18", "fc", 32),
        ("mobilenet_v2", "classifier.1", 32),
        ("densenet121", "classifier", 32),
        ("squeezenet1_0", "classifier.1", 64),
    ],
)
def test_classifier_of_torchvision(name: str, path: str, side: int) -> None:

    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, num_classes=11)
    teacher = Teacher(network, InputSpec((3, side, side)))
    assert (teacher.classifier_path, teacher.num_classes) == (path, 11)
    assert teacher.class_weights().shape[0] == 11
    assert teacher.class_weights().ndim == 2


class HeadFirst(nn.Module):
    """The classifier is defined first, and a second head of the same width is defined last and called before."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)
        self.body = nn.Linear(64, 16)
        self.auxiliary = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.seen = self.auxiliary(x)
        return self.head(self.body(x).tanh())


def test_classifier_is_what_makes_the_logits_not_what_is_defined_last() -> None:
    torch.manual_seed(0)
    teacher = Teacher(HeadFirst(), SMALL)
    assert teacher.classifier_path == "head"


def test_classifier_is_not_what_is_called_last_either() -> None:
    class HeadEarly(HeadFirst):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            self.seen = self.auxiliary(x.flatten(1))
            return logits

    torch.manual_seed(0)
    assert Teacher(HeadEarly(), SMALL).classifier_path == "head"


@pytest.mark.parametrize("behind", [nn.LogSoftmax(1), nn.Identity(), nn.Dropout(0.5)])
def test_classifier_with_something_behind_it(behind: nn.Module) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4), behind)
    assert Teacher(network, SMALL).classifier_path == "3"


def test_classifier_called_before_a_scaled_output() -> None:
    class Scaled(HeadFirst):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    assert Teacher(Scaled(), SMALL).classifier_path == "head"


def test_override_takes_precedence() -> None:
    teacher = Teacher(HeadFirst(), SMALL, classifier="auxiliary")
    assert teacher.classifier_path == "auxiliary"
    assert teacher.class_weights().shape == (4, 64)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [("heda", "'heda'.*body, auxiliary"), ("body", "'body'.*16 outputs.*4 classes"), ("", "its last ones")],
)
def test_wrong_override(classifier: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Teacher(HeadFirst(), SMALL, classifier=classifier)


def test_no_classifier_to_be_found_names_the_ways_out() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"teacher\.classifier.*classifier="):
        Teacher(network, SMALL)


def test_candidates_are_linear_layers_and_pointwise_convolutions() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 3))
    assert [path for path, _ in classifier_candidates(network)] == ["1", "3"]


# Errors.


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
@pytest.mark.parametrize("name", ["hidden.weight", "norm.running_var"])
def test_weights_that_are_not_finite_are_named(value: float, word: str, name: str) -> None:
    network = small_network()
    network.state_dict()[name].view(-1)[3] = value
    with pytest.raises(UserError, match=f"{word}.*'{name}'"):
        Teacher(network, SMALL)


def test_overflow_in_float32_is_refused() -> None:
    network = small_network().double()
    with torch.no_grad():
        network.head.weight.fill_(1e300)
    with pytest.raises(UserError, match="not finite"):
        Teacher(network, SMALL)


def test_wrong_input_shape_names_the_key() -> None:
    with pytest.raises(UserError, match=r"\[3, 32, 32\].*teacher\.input\.shape"):
        Teacher(zoo.lenet5(), COLOUR)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), r"\[2, 1\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)), r"\[2\]"),
        (nn.Conv2d(1, 4, 1), r"\[2, 4, 8, 8\]"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 128))), r"\[1, 128\]"),
    ],
)
def test_what_is_no_classifier_is_refused(network: nn.Module, shape: str) -> None:
    with pytest.raises(UserError, match=f"{shape}.*at least 2 classes"):
        Teacher(network, SMALL)


def test_hooks_of_the_search_are_removed_on_failure_too() -> None:
    network = zoo.lenet5()
    with pytest.raises(UserError):
        Teacher(network, COLOUR)
    assert all(not module._forward_hooks for module in network.modules())
    teacher = Teacher(network, GREY)
    assert all(not module._forward_hooks for module in teacher.model.modules())


# Outputs.

Answer = namedtuple("Answer", ["logits", "features"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, y * 2),
        lambda y: [None, y],
        lambda y: {"features": y[:, :2], "logits": y},
        lambda y: OrderedDict(out=y, aux=y * 2),
        lambda y: Answer(y, y[:, :2]),
        lambda y: SimpleNamespace(logits=y, hidden=None),
    ],
)
def test_outputs_that_hold_the_logits(wrap) -> None:
    network = small_network().eval()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor):
            return wrap(self.inner(x))

    images = torch.rand(3, 1, 8, 8)
    teacher = Teacher(Wrapped(), SMALL)
    assert teacher.classifier_path == "inner.head"
    torch.testing.assert_close(teacher(images), network(images))


def test_output_function_and_its_absence() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, x: Tensor):
            return SimpleNamespace(answer=self.inner(x))

    with pytest.raises(UserError, match=r"SimpleNamespace.*output="):
        Teacher(Strange(), SMALL)
    teacher = Teacher(Strange(), SMALL, output=lambda result: result.answer)
    assert teacher(torch.rand(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("output", [None, "text", (), {}, {"a": 1}, [1, 2], 3.0])
def test_first_tensor_refuses_what_holds_none(output: object) -> None:
    with pytest.raises(UserError, match="no tensor of logits"):
        first_tensor(output)


# Inputs.


def test_normalisation_is_applied_once() -> None:
    network = small_network(channels=3).eval()
    spec = InputSpec((3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    images = torch.rand(4, 3, 8, 8)
    by_hand = images.clone()
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        by_hand[:, channel] = (by_hand[:, channel] - mean) / std
    torch.testing.assert_close(Teacher(network, spec)(images), network(by_hand))
    single = InputSpec((3, 8, 8), mean=(0.4,), std=(0.2,))
    torch.testing.assert_close(Teacher(network, single)(images), network((images - 0.4) / 0.2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (1, 0, 8)}, "at least 1"),
        ({"low": 1.0}, "from 1.0 to 1.0"),
        ({"low": float("nan")}, "value range"),
        ({"high": float("inf")}, "value range"),
        ({"mean": (0.1, 0.2)}, "mean is a list of one number"),
        ({"std": (0.0,)}, "positive"),
        ({"std": (float("nan"),)}, "std is a list"),
    ],
)
def test_input_specs_outside_their_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputSpec(**{"shape": (1, 8, 8), **arguments})


def test_midpoint() -> None:
    middle = InputSpec((2, 3, 4), low=-1, high=3).midpoint(5)
    assert middle.shape == (5, 2, 3, 4)
    assert middle.unique().tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_teachers_of_other_precision_answer_in_float32(dtype: torch.dtype) -> None:
    network = small_network().eval().to(dtype)
    teacher = Teacher(network, SMALL)
    images = torch.rand(3, 1, 8, 8)
    assert teacher(images).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in teacher.model.parameters())
    assert next(network.parameters()).dtype == dtype
    torch.testing.assert_close(teacher(images), copy.deepcopy(network).float()(images))


def test_images_get_gradients_and_weights_do_not() -> None:
    teacher = small_teacher()
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    teacher(images).square().sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0
    assert all(p.grad is None for p in teacher.model.parameters())


def test_predict_takes_images_in_half_precision_as_stores_have_them() -> None:
    teacher = small_teacher()
    images = torch.rand(5, *teacher.spec.shape, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(teacher.predict(images), teacher.predict(images.float()))


def test_predict_in_batches() -> None:
    teacher = small_teacher()
    images = torch.rand(23, 1, 8, 8, generator=random(0))
    answers = teacher.predict(images, batch=5)
    assert not answers.requires_grad
    torch.testing.assert_close(answers, teacher(images))


# The fingerprint.


def test_fingerprint_says_which_teacher_it_is() -> None:
    assert small_teacher().fingerprint == small_teacher().fingerprint
    base = small_network()
    prints = {"base": Teacher(base, SMALL).fingerprint}
    for name in base.state_dict():
        changed = copy.deepcopy(base)
        value = changed.state_dict()[name]
        value.view(-1)[0] += 1 if not value.is_floating_point() else 1e-4
        prints[name] = Teacher(changed, SMALL).fingerprint
    prints["high"] = Teacher(base, InputSpec((1, 8, 8), high=2.0)).fingerprint
    prints["mean"] = Teacher(base, InputSpec((1, 8, 8), mean=(0.1,))).fingerprint
    prints["head"] = Teacher(HeadFirst(), SMALL, classifier="head").fingerprint
    prints["auxiliary"] = Teacher(HeadFirst(), SMALL, classifier="auxiliary").fingerprint
    assert len(set(prints.values())) == len(prints)


def test_fingerprint_says_what_the_modules_do() -> None:
    def network(layer: nn.Module, **settings: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(1, 4, 3, **settings), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
            )

    layers = [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)]
    layers += [nn.LocalResponseNorm(2, k=1), nn.LocalResponseNorm(2, k=2)]
    networks = [*map(network, layers), network(nn.ReLU(), stride=2), network(nn.ReLU(), padding=1)]
    weights = networks[0].state_dict()
    prints = [Teacher(one, SMALL).fingerprint for one in networks]
    prints.append(Teacher(networks[0], SMALL, output=lambda logits: logits / 10).fingerprint)
    prints.append(Teacher(networks[0], SMALL, code="0" * 64).fingerprint)
    assert all(torch.equal(value, weights[name]) for one in networks for name, value in one.state_dict().items())
    assert len(set(prints)) == len(prints)


def test_fingerprint_does_not_depend_on_training_mode_or_memory_layout() -> None:
    network = small_network()
    plain = Teacher(network.eval(), SMALL).fingerprint
    assert Teacher(network.train(), SMALL).fingerprint == plain
    assert Teacher(network.to(memory_format=torch.channels_last), SMALL).fingerprint == plain


def test_recording_outputs() -> None:
    teacher = small_teacher()
    images = torch.rand(2, 1, 8, 8)
    with recording_outputs(teacher.model, ["conv", "head"]) as features:
        logits = teacher(images)
    assert torch.equal(features["head"], logits)
    assert features["conv"].shape == (2, 6, 3, 3)
    assert all(not module._forward_hooks for module in teacher.model.modules())
    with pytest.raises(UserError, match="'nothing'"), recording_outputs(teacher.model, ["conv", "nothing"]):
        pass
    assert all(not module._forward_hooks for module in teacher.model.modules())


def test_a_fingerprint_does_not_tell_a_whole_number_from_a_decimal_one() -> None:
    network = small_network()
    whole, decimal = InputSpec((1, 8, 8), 0, 1, [0], [1]), InputSpec((1, 8, 8), 0.0, 1.0, (0.0,), (1.0,))
    assert whole == decimal
    assert Teacher(network, whole).fingerprint == Teacher(network, decimal).fingerprint


def test_large_images_are_answered_in_smaller_batches() -> None:
    assert InputSpec((1, 32, 32)).inference_batch == InputSpec((3, 32, 32)).inference_batch == 1000
    assert InputSpec((3, 224, 224)).inference_batch == 20
    assert InputSpec((3, 4000, 4000)).inference_batch == 1
    assert InputSpec((3, 224, 224)).inference_batch_on("cpu") == 1
    assert InputSpec((3, 32, 32)).inference_batch_on("cpu") == 50
    assert InputSpec((3, 32, 32)).inference_batch_on("cuda:0") == 1000


def test_a_batch_norm_that_remembers_nothing() -> None:
    network = small_network()
    network.norm = torch.nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(UserError, match=r"'norm' is a BatchNorm without running statistics"):
        Teacher(network, SMALL)


# Teachers by name, and what is made of one.


def test_a_shape_is_enough_of_a_spec() -> None:
    teacher = Teacher(small_network(), (1, 8, 8))
    assert teacher.spec == SMALL
    assert teacher.fingerprint == small_teacher().fingerprint


def test_a_student_is_a_trainable_copy_with_the_same_weights() -> None:
    teacher = small_teacher()
    student = teacher.student()
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(student(images), teacher(images))
    assert all(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        student.head.weight.add_(1)
    assert not torch.equal(student(images), teacher(images))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_example_inputs_are_grey_and_normalised() -> None:
    teacher = Teacher(small_network(), InputSpec((1, 8, 8), mean=(0.25,), std=(0.5,)))
    assert teacher.example_input().shape == (2, 1, 8, 8)
    assert teacher.example_input(3).unique().tolist() == [0.5]
    assert len(teacher.example_input(3)) == 3


def test_teachers_by_name() -> None:
    shipped = load_teacher("lenet5-digits")
    assert shipped.spec == InputSpec((1, 32, 32))
    named = load_teacher("zoo:lenet5", (1, 32, 32), "zoo:lenet5-digits")
    assert named.fingerprint == shipped.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lenet6",), "No trained weights 'lenet6'"),
        (("lenet5-digits", (1, 32, 32)), "brings its own spec"),
        (("zoo:lenet5",), "input of 'zoo:lenet5'"),
        (("zoo:lenet5", (1, 32, 32)), "weights= is missing"),
        (("zoo:lenet5", (1, 32, 32), "there/is/none.safetensors"), "There is no weights file"),
        (("zoo:lenet5_half", (1, 32, 32), "zoo:lenet5-digits"), "do not fit the network"),
    ],
)
def test_teachers_that_cannot_be_loaded(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_teacher(*arguments)


# What torchvision's transforms say about an input.


def test_presets_of_torchvision() -> None:
    spec = InputSpec.from_transforms(torchvision.models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms())
    assert spec == InputSpec((3, 384, 384), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("steps", "channels", "spec"),
    [
        ([v2.Resize((8, 6)), v2.ToTensor()], None, InputSpec((1, 8, 6))),
        (
            [v2.Resize(9), v2.CenterCrop(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)],
            3,
            InputSpec((3, 8, 8)),
        ),
        (
            [v2.Grayscale(3), v2.RandomCrop(8), v2.Normalize([0.5], [0.25])],
            None,
            InputSpec((3, 8, 8), 0, 1, (0.5,), (0.25,)),
        ),
        (
            [v2.RandomResizedCrop(8), v2.ToDtype(torch.float32), v2.Compose([v2.Normalize([9, 8, 7], [3, 2, 1])])],
            None,
            InputSpec((3, 8, 8), 0, 255, (9, 8, 7), (3, 2, 1)),
        ),
    ],
)
def test_lists_of_transforms(steps: list[nn.Module], channels: int | None, spec: InputSpec) -> None:
    assert InputSpec.from_transforms(v2.Compose(steps), channels) == spec
    assert InputSpec.from_transforms(nn.Sequential(*steps), channels) == spec


@pytest.mark.parametrize(
    "transforms",
    [
        torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT.transforms(),
        v2.Compose([v2.Resize(8), v2.ToTensor()]),
        v2.Compose([v2.CenterCrop(8), v2.Pad(2)]),
        v2.Compose([v2.ToTensor()]),
        "resize",
    ],
)
def test_transforms_that_do_not_tell_the_size(transforms: object) -> None:
    with pytest.raises(UserError, match=r"height and width.*InputSpec"):
        InputSpec.from_transforms(transforms)


def test_the_exporter_makes_the_same_where_its_operators_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_network()
    kept = onnx_export.onnx_bytes(network, SMALL)
    assert onnx_export._operators() is not None, "nothing is kept: the exporter of this PyTorch is another"
    monkeypatch.setattr(onnx_export, "_operators", lambda: None)
    assert onnx_export.onnx_bytes(network, SMALL) == kept


def test_exporting_without_images_and_with_a_transfer_source(tmp_path) -> None:
    teacher = Teacher(small_network(), InputSpec((1, 8, 8), high=255.0, mean=(100.0,), std=(50.0,)))
    sources = (None, NoiseSource(teacher.spec, 4), torch.full((3, 1, 8, 8), 7.0))
    for number, images in enumerate(sources):
        path = tmp_path / f"{number}.onnx"
        assert export_onnx(teacher.student(), teacher.spec, str(path), images) < 1e-4
        images = torch.full((3, 1, 8, 8), 7.0)
        torch.testing.assert_close(run_onnx(path, images), teacher(images), atol=1e-4, rtol=1e-4)


def test_onnxruntime_is_quiet_in_our_sessions_alone(capfd: pytest.CaptureFixture[str]) -> None:
    model = onnx.load_from_string(onnx_bytes(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), InputSpec((1, 4, 4))))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2, np.float32), "read_by_nothing"))
    capfd.readouterr()
    onnx_session(model.SerializeToString())
    assert capfd.readouterr().err == ""
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert "read_by_nothing" in capfd.readouterr().err
