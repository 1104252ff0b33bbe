"""Networks as people write them: flattened by ``view``, changing their input, with neighbours to import."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, random
from torch import Tensor, nn

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.build import build_network
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.own_source import copy_source
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.models.teacher import Teacher
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.runtime.tensors import save_tensors
from zskd_nni.synthesis import SynthesisSettings, synthesize
from zskd_nni.training.distillation import DistillationSettings, distill


class Viewed(nn.Module):
    """As in PyTorch's own tutorial: behind a convolution that has its channels last there is no such view."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().view(len(x), -1))


class InPlace(Viewed):
    """Normalises what it is given where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.sub_(0.5).div_(0.5)).relu().flatten(1))


def made(kind: type[Viewed], seed: int = 0, width: int = 6) -> Viewed:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(width)


@pytest.mark.parametrize("kind", [Viewed, InPlace])
def test_a_teacher_answers_as_its_network(kind: type[Viewed]) -> None:
    network, images = made(kind), torch.rand((7, 1, 8, 8), generator=random(0))
    before, wanted = images.clone(), network(images.clone())
    teacher = Teacher(network, SMALL)
    asked = images.clone().requires_grad_(True)
    answered = teacher(asked)
    torch.testing.assert_close(answered, wanted)
    assert torch.equal(asked.detach(), before)  # the images are not the network's own
    assert float(torch.autograd.grad(answered.sum(), asked)[0].abs().sum()) > 0
    last = images.contiguous(memory_format=torch.channels_last).expand(-1, 1, -1, -1)
    torch.testing.assert_close(teacher(last), wanted)
    assert not network._forward_pre_hooks


@pytest.mark.parametrize("kind", [Viewed, InPlace])
def test_from_impressions_to_a_student(kind: type[Viewed], tmp_path: Path) -> None:
    teacher = Teacher(made(kind), SMALL)
    plan, settings = ZskdTargets(teacher, ZskdSettings()), SynthesisSettings(max_steps=5, shard=20)
    store = synthesize(teacher, plan, settings, size=40, seed=0, folder=tmp_path, quiet=True)
    kept = store.images()
    student = made(kind, 1, 3)
    source = StoredSource(kept, 10, 0, store.fingerprint)
    history = distill(student, teacher, source, DistillationSettings(steps=8, batch=10), quiet=True)
    assert history.losses
    assert torch.equal(kept, store.images())


@pytest.mark.parametrize("kind", [Viewed, InPlace])
def test_against_a_generator(kind: type[Viewed]) -> None:
    spec = InputSpec((3, 8, 8))
    networks = [nn.Sequential(nn.Conv2d(3, 1, 1), made(kind, seed)) for seed in (0, 1)]
    teacher = Teacher(networks[0], spec)
    settings = ZsktSettings(rounds=2, student_steps=2, latent=4, width=4, batch=6)
    train_zskt(networks[1], teacher, settings, quiet=True)
    images = ZsktSource(teacher, settings, 6, 0).batch(0, random(0), networks[1])
    assert images.is_contiguous()  # whoever calls an unprepared network with them


def test_others_have_their_channels_last() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    use_channels_last(network, torch.zeros(2, 1, 8, 8))
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not network._forward_pre_hooks
    viewed = use_channels_last(use_channels_last(made(Viewed), torch.zeros(2, 1, 8, 8)), torch.zeros(2, 1, 8, 8))
    assert viewed.conv.weight.is_contiguous()
    assert len(viewed._forward_pre_hooks) == 1


def test_a_network_that_cannot_be_copied() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(network[1])
    network(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match=r"cannot be copied .*remove_weight_norm\.$"):
        Teacher(network, SMALL)


# In files beside a recipe.

NETWORK = """
    from torch import nn
    from layers_of_mine import block

    def net(width=4):
        return nn.Sequential(*block(width), nn.Flatten(), nn.Linear(width * 900, 10))

    def lazy():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

    class Shifted(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.in_place, self.conv, self.head = in_place, nn.Conv2d(1, 8, 5, stride=3), nn.Linear(8 * 100, 10)

        def forward(self, x):
            x = x.sub_(0.5) if self.in_place else x - 0.5
            return self.head(self.conv(x).relu().flatten(1))
"""
LAYERS = """
    from torch import nn

    def block(width):
        return nn.Conv2d(1, width, 3), nn.ReLU()
"""
RECIPE = """
    name: mine
    teacher: {{model: "{module}:net", weights: teacher.safetensors, input: {{shape: [1, 32, 32]}}}}
    student: {{model: "{module}:net", arguments: {{width: 2}}}}
    transfer: {transfer}
    distillation: {{steps: 4, batch: 16}}
    controls: []
    evaluation: {{data: {data}}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "nets_of_mine.py").write_text(textwrap.dedent(NETWORK))
    (folder / "layers_of_mine.py").write_text(textwrap.dedent(LAYERS))
    save_tensors(folder / "teacher.safetensors", build_network("nets_of_mine.py:net", base=folder).state_dict())
    yield folder
    for name in ("nets_of_mine", "layers_of_mine"):
        sys.modules.pop(name, None)


def recipe(folder: Path, module: str, transfer: str = "{size: 40, held_out: 20}", data: str = "digits") -> Path:
    path = folder / "mine.yml"
    path.write_text(textwrap.dedent(RECIPE.format(module=module, transfer=transfer, data=data)))
    return path


@pytest.mark.parametrize("module", ["nets_of_mine.py", "nets_of_mine"])
def test_a_network_and_its_neighbours_load_again_from_anywhere(project: Path, module: str, tmp_path: Path) -> None:
    changes = ["transfer.synthesis.max_steps=3"]
    Run(load_recipe(str(recipe(project, module)), changes), tmp_path / "out", quiet=True).compress()
    for name in ("nets_of_mine", "layers_of_mine"):
        sys.modules.pop(name, None)
    assert load_network(tmp_path / "out" / "student.json")[0].out_channels == 2
    # The folder is moved to another machine, where the recipe's folder is not.
    shutil.move(tmp_path / "out", tmp_path / "far" / "away")
    shutil.rmtree(project)
    for name in [name for name in sys.modules if name.endswith("_of_mine") or name.startswith("zskd_nni_user_")]:
        sys.modules.pop(name, None)
    assert load_network(tmp_path / "far" / "away" / "student.json")[0].out_channels == 2


def test_a_network_in_a_package_is_saved_with_the_package(tmp_path: Path) -> None:
    package = tmp_path / "here" / "parts_for_the_move"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("from .width import WIDTH\n")
    (package / "inner" / "width.py").write_text("import tables_for_the_move\nWIDTH = tables_for_the_move.WIDTH\n")
    (package / "net.py").write_text(
        "from torch import nn\nfrom .inner import WIDTH\ndef make() -> nn.Module:\n    return nn.Linear(2, WIDTH)\n"
    )
    (tmp_path / "here" / "tables_for_the_move.py").write_text("WIDTH = 3\n")
    (tmp_path / "here" / "unrelated.py").write_text("raise SystemExit\n")
    folder, reference = tmp_path / "out", "parts_for_the_move.net:make"
    folder.mkdir()
    network = build_network(reference, base=tmp_path / "here")
    save_network(network, reference, {}, folder / "n.safetensors", folder / "n.json", tmp_path / "here")
    assert not (folder / "n_source" / "unrelated.py").exists()
    shutil.rmtree(tmp_path / "here")
    for name in [name for name in sys.modules if "for_the_move" in name]:
        sys.modules.pop(name)
    assert torch.equal(load_network(folder / "n.json").weight, network.weight)


def test_a_package_is_copied_and_not_the_module_of_its_name(tmp_path: Path) -> None:
    for name, width in (("twice_there", 3), ("twice_there/__init__", 4)):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(f"WIDTH = {width}\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom twice_there import WIDTH\ndef make():\n    return nn.Linear(2, WIDTH)\n"
    )
    network = build_network("net.py:make", base=tmp_path)
    assert network.out_features == 4
    copied = copy_source("net.py:make", tmp_path, tmp_path / "n.json")
    sys.modules.pop("twice_there")
    assert build_network(copied["network"], base=tmp_path).out_features == 4
    assert not (tmp_path / "n_source" / "twice_there.py").exists()
    sys.modules.pop("twice_there")


def test_a_saved_network_with_a_wrong_base(project: Path, tmp_path: Path) -> None:
    Run(
        load_recipe(str(recipe(project, "nets_of_mine")), ["transfer.synthesis.max_steps=3"]), tmp_path / "out"
    ).compress()
    path = tmp_path / "out" / "student.json"
    content = json.loads(path.read_text())
    assert content["base"] == "student_source"
    path.write_text(json.dumps({**content, "base": 3}))
    with pytest.raises(UserError, match="'base' must be the name of a folder, not 3"):
        load_network(path)


def test_what_a_file_puts_on_the_path_stays_and_what_we_put_there_does_not(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (project / "elsewhere").mkdir()
    file = project / "nets_of_mine.py"
    file.write_text(f"import sys\nsys.path.append({str(project / 'elsewhere')!r})\n{file.read_text()}")
    build_network("nets_of_mine.py:net", base=project)
    assert str(project / "elsewhere") in sys.path
    assert str(project) not in sys.path


def test_lazy_layers_are_named(project: Path) -> None:
    with pytest.raises(UserError, match=r"a layer '1' whose size is only known after a forward pass \(LazyLinear\)"):
        build_network("nets_of_mine.py:lazy", base=project)


@pytest.mark.parametrize("fused", [False, True])
def test_a_student_may_change_its_input_in_place(project: Path, tmp_path: Path, fused: bool) -> None:
    """Pruned, shrunken, quantized, exported and measured as if it did not."""
    quantized = "{op_types: [Conv2d, Linear], target_names: [_input_, weight], quant_dtype: int8, quant_scheme: affine}"
    changes = [
        "transfer.synthesis.max_steps=3",
        f"student.model={project / 'nets_of_mine.py'}:Shifted",
        "compression.pruning={steps: 2, config_list: [{op_types: [Conv2d], sparse_ratio: 0.5}]}",
        f"compression.quantization={{quantizer: QATQuantizer, steps: 3, config_list: [{quantized}]}}",
        f"compression.quantization.fused={str(fused).lower()}",
        "controls=[none]",
    ]
    reports = []
    for in_place in (False, True):
        arguments = f"student.arguments={{in_place: {str(in_place).lower()}}}"
        loaded = load_recipe(str(recipe(project, "nets_of_mine.py")), [*changes, arguments])
        reports.append(Run(loaded, tmp_path / str(in_place), quiet=True).compress())
    for key in (
        "accuracy",
        "agreement",
        "agreement_int8",
        "agreement_held_out",
        "agreement_onnx",
        "controls",
        "history",
    ):
        assert reports[0][key] == reports[1][key], key


# Real images that change.


def images_into(path: Path, seed: int, count: int = 60) -> None:
    chance = np.random.default_rng(seed)
    np.savez(path, images=chance.integers(0, 256, (count, 32, 32), dtype=np.uint8), labels=np.arange(count) % 10)


def test_real_images_that_have_changed_are_not_passed_over(project: Path, tmp_path: Path) -> None:
    images_into(project / "mine.npz", 0)
    path = recipe(project, "nets_of_mine.py", "{method: real, data: mine.npz, size: 30, held_out: 20}")
    out = tmp_path / "out"
    report = Run(load_recipe(str(path)), out, quiet=True).compress()
    assert report["agreement_on"].startswith("test data")
    before = sha256_of_file(out / "student.safetensors")
    Run(load_recipe(str(path)), out, quiet=True).compress()
    assert sha256_of_file(out / "student.safetensors") == before
    images_into(project / "mine.npz", 1)
    with pytest.raises(UserError, match=r"the images have changed since .* was begun.*Use another output folder"):
        Run(load_recipe(str(path)), out, quiet=True).compress()


@pytest.mark.parametrize(("named", "same"), [("./mine.npz", True), ("../project/mine.npz", True), ("other.npz", False)])
def test_a_report_knows_the_images_it_is_measured_on_by_any_name(
    project: Path, tmp_path: Path, named: str, same: bool
) -> None:
    for number, name in enumerate(("mine.npz", "other.npz")):
        images_into(project / name, number)
    transfer = f"{{method: real, data: {named}, size: 30, held_out: 20}}"
    path = recipe(project, "nets_of_mine.py", transfer, "mine.npz")
    report = Run(load_recipe(str(path)), tmp_path / "out", quiet=True).compress()
    assert report["learnt_on_what_is_measured"] is same
