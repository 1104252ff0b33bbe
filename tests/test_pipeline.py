"""A recipe from its teacher to its report, on the embedded digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import run_cli
from onnx import numpy_helper

from zskd_nni.data.datasets import load_images
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import run_onnx
from zskd_nni.models.serialization import load_network
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.comparison import tables, verdict
from zskd_nni.pipeline.report_html import remarks, render_html, render_table
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy

SMALL = (
    "transfer.size=300",
    "transfer.held_out=100",
    "transfer.synthesis.shard=150",
    "compression.pruning.steps=20",
    "compression.quantization.steps=20",
    "distillation.steps=40",
)
SPEC = InputSpec((1, 32, 32))


def run(out: Path, *changes: str, seed: int = 0) -> dict:
    return Run(load_recipe("digits-prune50", [*SMALL, *changes], seed), out, quiet=True).compress()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("digits")
    return out, run(out)


def test_everything_a_run_promises_is_there(finished):
    out, report = finished
    for name in (
        "report.json",
        "report.html",
        "student.safetensors",
        "student.json",
        "student.onnx",
        "impressions.png",
        "impressions/manifest.json",
    ):
        assert (out / name).stat().st_size > 0, name
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["parameters"] == {"teacher": 61706, "student": 35820}
    assert set(report["accuracy"]) == {"teacher", "student", "student_int8"}
    assert 0 <= report["agreement"] <= 1
    assert report["seconds"]["total"] == pytest.approx(sum(v for k, v in report["seconds"].items() if k != "total"))
    assert report["bytes"]["student"]["onnx"] == (out / "student.onnx").stat().st_size
    assert set(report["controls"]) == {"none", "noise"}
    assert report["provenance"]["seed"] == 0
    assert report["pruning"]["max_logit_difference"] <= 1e-4


def test_the_saved_student_and_its_onnx_answer_as_reported(finished):
    out, report = finished
    network = load_network(out / "student.json")
    data = load_images("digits", "test")
    logits = logits_on(lambda images: network(SPEC.normalise(images)), data, SPEC)
    assert accuracy(logits, data.labels) == pytest.approx(report["accuracy"]["student"], abs=1e-3)
    answered = run_onnx(out / "student.onnx", data.pixels(slice(None), SPEC))
    assert torch.allclose(answered, logits, atol=1e-3 * float(logits.abs().max()))
    assert network.conv1.out_channels == 3
    assert network.conv2.out_channels == 8


def test_the_integers_are_a_file_that_answers_as_reported(finished):
    out, report = finished
    integers = out / "student-int8.onnx"
    assert report["bytes"]["student"]["onnx_int8"] == integers.stat().st_size < report["bytes"]["teacher"]["onnx"] / 5
    assert report["agreement_onnx"] >= 0.995
    assert set(report["latency_ms"]) == {"teacher", "student", "student_int8"}
    assert all(value > 0 for value in report["latency_ms"].values())
    data = load_images("digits", "test")
    answered = run_onnx(integers, data.pixels(slice(None), SPEC))
    assert accuracy(answered, data.labels) == pytest.approx(report["accuracy"]["student_int8"], abs=1e-3)
    assert abs(report["accuracy"]["student_int8"] - report["accuracy"]["student"]) < 5
    assert all(control["accuracy_int8"] is not None for control in report["controls"].values())
    page = (out / "report.html").read_text()
    assert "student, int8" in page and "quantized by calibration alone" in page
    assert report["macs"] == {"teacher": 416520, "student": 153720}
    assert report["batch_norm"] is False
    assert set(report["agreements"]) == {
        f"{name}{end}" for name in ("student", "none", "noise") for end in ("", "_int8")
    } | {"teacher"}


def test_evaluate_measures_both_onnx_files(finished):
    out, report = finished
    said = run_cli("evaluate", out, "--data", "digits").stdout.splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in said] == [
        "student.json",
        "student.onnx",
        "student-int8.onnx",
    ]
    assert f"accuracy {report['accuracy']['student']:.2f} %" in said[0]
    assert f"accuracy {report['accuracy']['student_int8']:.2f} %" in said[2]


def test_the_files_tell_nothing_of_the_machine_that_wrote_them(finished):
    out, _ = finished
    for file in (*out.glob("*.onnx"), out / "state" / "teacher.onnx"):
        data = file.read_bytes()
        assert not any(word in data for word in (b"site-packages", b"stack_trace", b"/zskd_nni/")), file


def zeros_of(description: Path) -> dict[str, float]:
    parameters = load_network(description).named_parameters()
    return {name: float((weight == 0).float().mean()) for name, weight in parameters if name.endswith("weight")}


def test_single_weights_that_are_pruned_stay_zero_to_the_end(tmp_path):
    level = (
        "compression.pruning.pruner=LevelPruner",
        "compression.pruning.config_list=[{op_types: [Linear], sparse_ratio: 0.6}]",
        "compression.quantization.quantizer=QATQuantizer",
        "controls=[]",
    )
    report = run(tmp_path, *level)
    for name in ("state/student-pruned.json", "state/student.json", "student.json", "state/student-quantized.json"):
        found = zeros_of(tmp_path / name)
        assert all(share >= 0.59 for layer, share in found.items() if layer.startswith("fc")), (name, found)
        assert found["conv1.weight"] < 0.01
    assert report["pruning"]["zeros"] == pytest.approx(0.6, abs=0.02) and not report["pruning"]["shrunk"]
    integers = [numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "student-int8.onnx").graph.initializer]
    layers = [each for each in integers if each.dtype == np.int8 and each.ndim == 2]
    assert len(layers) == 3 and all((each == 0).mean() >= 0.59 for each in layers)

    state = tmp_path / "state"
    files = ("student.safetensors", "student-quantized.safetensors")
    before = [sha256_of_file(state / name) for name in files]
    for file in (*state.glob("student.*"), *state.glob("student-quantized.*")):
        file.unlink()
    run(tmp_path, *level)
    assert [sha256_of_file(state / name) for name in files] == before


def test_a_lost_quantization_is_made_again_alike(finished, tmp_path):
    out, report = finished
    shutil.copytree(out, tmp_path / "copy")
    state = tmp_path / "copy" / "state"
    for file in state.glob("student-quantized*"):
        file.unlink()
    again = run(tmp_path / "copy")
    assert again["accuracy"] == report["accuracy"]
    for name in ("student-quantized.calibration.pt", "student-quantized.safetensors"):
        assert sha256_of_file(state / name) == sha256_of_file(out / "state" / name)


def test_calibration_alone_of_the_teacher_itself(tmp_path):
    report = run(
        tmp_path,
        "compression.pruning=null",
        "compression.quantization.quantizer=PtqQuantizer",
        "compression.quantization.fuse_batch_norm=true",
        "controls=[noise]",
    )
    assert report["quantization"]["note"] == "fuse_batch_norm found nothing to fold"
    assert report["parameters"]["student"] == report["parameters"]["teacher"]
    assert report["accuracy"]["student"] == report["accuracy"]["teacher"]
    assert report["accuracy"]["student_int8"] > report["accuracy"]["teacher"] - 1
    assert report["history"] is None and report["pruning"] is None
    # Nothing was distilled, and nothing says that it was.
    noise = report["controls"]["noise"]
    assert noise["label"] == "calibrated on noise" and "calibrated on uniform noise" in noise["what"]
    terminal, page = render_table(report), (tmp_path / "report.html").read_text()
    (table,) = tables(report)  # in floating point the student is the teacher itself
    assert table.columns == ["teacher, float32", "student, int8", "calibrated on noise"]
    assert "int8" in terminal and "calibrated on noise" in page
    assert f"Calibrated on noise: {noise['what']}." in page
    assert "distill" not in terminal and "distill" not in page.split("<summary>Provenance</summary>")[0]


def test_the_controls_of_a_distilled_student_say_so(finished):
    out, report = finished
    assert [control["label"] for control in report["controls"].values()] == ["not distilled", "distilled on noise"]
    terminal, page = render_table(report), (out / "report.html").read_text()
    in_float, in_integers = tables(report)
    assert in_float.columns == ["teacher", "student", "not distilled", "distilled on noise"]
    assert in_integers.columns == [
        "teacher, float32", "student, float32", "student, int8", "not distilled", "distilled on noise",
    ]  # fmt: skip
    for table, suffix in ((in_float, ""), (in_integers, "_int8")):
        accuracies = dict(table.rows)["accuracy"]
        assert accuracies[-1] == f"{report['controls']['noise'][f'accuracy{suffix}']:.2f} %"
        assert all(cell in terminal and cell in page for cell in accuracies)
    assert page.index(verdict(report)[0].replace(" %", "\N{NO-BREAK SPACE}%").partition("'")[0]) < page.index("<table")
    assert max(map(len, terminal.splitlines())) <= 80
    assert "calibrated on noise" not in terminal + page


def test_a_quantizer_that_changes_weights_is_measured_in_simulation(tmp_path):
    config = "{op_names: [conv2], target_names: [weight], quant_dtype: int8, quant_scheme: affine}"
    section = f"compression.quantization={{quantizer: DoReFaQuantizer, steps: 20, config_list: [{config}]}}"
    report = run(tmp_path, section, "controls=[none]")
    assert report["bytes"]["student"]["onnx_int8"] is report["agreement_onnx"] is report["latency_ms"]["student_int8"]
    assert report["bytes"]["student"]["onnx_int8"] is None and "simulated" in report["quantization"]["note"]
    assert report["accuracy"]["student_int8"] is not None
    assert report["controls"]["none"]["accuracy_int8"] is None  # it cannot do without training
    assert not (tmp_path / "student-int8.onnx").exists()


def test_without_a_quantizer_its_figures_are_null(tmp_path):
    report = run(tmp_path, "compression.quantization=null", "controls=[]")
    assert report["accuracy"]["student_int8"] is None and report["agreement_onnx"] is None
    assert report["latency_ms"]["student"] > 0 and report["latency_ms"]["student_int8"] is None


def test_a_quantizer_that_nni_refuses_is_told_before_any_work(tmp_path):
    with pytest.raises(UserError, match="refuses the config"):
        run(tmp_path / "out", "compression.quantization.config_list.0.quant_scheme=wrong")
    with pytest.raises(UserError, match="with a number of bits, such as int8, not 'float7'"):
        run(tmp_path / "out", "compression.quantization.config_list.0.quant_dtype=float7")
    assert not (tmp_path / "out").exists()


def test_a_distiller_that_nothing_asks_is_refused(tmp_path):
    distiller = "compression.distiller={name: ZeroShotDistiller}"
    with pytest.raises(UserError, match=r"compression\.distiller trains the student while NNI prunes or quantizes it"):
        run(tmp_path / "out", "compression.pruning=null", distiller)
    with pytest.raises(UserError, match="nothing is trained there"):
        run(tmp_path / "out", "compression.pruning.steps=0", distiller)
    assert not (tmp_path / "out").exists()


def test_distillation_repairs_what_pruning_broke(finished):
    _, report = finished
    assert report["accuracy"]["student"] > report["controls"]["none"]["accuracy"] + 1
    assert report["accuracy"]["teacher"] > 97


def test_the_same_run_again_does_nothing_twice(finished):
    out, report = finished
    before = {path: (path.stat().st_mtime_ns, sha256_of_file(path)) for path in (out / "state").glob("student*")}
    again = run(out)
    assert before == {
        path: (path.stat().st_mtime_ns, sha256_of_file(path)) for path in (out / "state").glob("student*")
    }
    assert again["accuracy"] == report["accuracy"]


def test_a_lost_stage_is_made_again_alike(finished, tmp_path):
    out, _ = finished
    run(tmp_path)
    for name in ("student.safetensors", "student.json"):
        (tmp_path / "state" / name).unlink()
    (tmp_path / "impressions" / "shard-00001.safetensors").write_bytes(b"damaged")
    run(tmp_path)
    for name in ("student.safetensors", "impressions/shard-00000.safetensors", "impressions/shard-00001.safetensors"):
        assert sha256_of_file(tmp_path / name) == sha256_of_file(out / name), name


def test_a_report_shows_markup_as_text(finished):
    out, report = finished
    mark = "<script>alert(1)</script>"
    page = render_html(out, {**report, "name": mark, "description": mark, "classifier": mark, "agreement_on": mark})
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("changes", "seed", "named"),
    [((), 1, "seed"), (("distillation.temperature=5",), 0, "distillation.temperature")],
)
def test_the_folder_of_another_run_is_refused(finished, changes, seed, named):
    out, _ = finished
    with pytest.raises(UserError, match=f"belongs to another run .*{named}"):
        run(out, *changes, seed=seed)


def test_a_damaged_stage_is_run_again_alike(finished, tmp_path, capsys):
    out, _ = finished
    run(tmp_path)
    (tmp_path / "state" / "student.safetensors").write_bytes(b"damaged")
    calibration = tmp_path / "state" / "student-quantized.calibration.pt"
    calibration.write_bytes(calibration.read_bytes()[:-1])
    run(tmp_path)
    assert capsys.readouterr().err.count("run again") == 2
    assert sha256_of_file(calibration) == sha256_of_file(out / "state" / calibration.name)
    assert sha256_of_file(tmp_path / "student.safetensors") == sha256_of_file(out / "student.safetensors")


def test_without_a_folder_of_test_data_a_recipe_runs_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("ZSKD_NNI_DATA", raising=False)
    report = run(tmp_path, "evaluation.data=mnist", "controls=[]")
    assert report["accuracy"]["student"] is None
    assert "procedural" in report["agreement_on"]
    assert "ZSKD_NNI_DATA" in capsys.readouterr().err


def test_test_images_that_do_not_fit_are_refused_before_the_work(tmp_path):
    bands = np.zeros((4, 8, 8, 12), np.uint8)
    np.savez(tmp_path / "bands.npz", images=bands, labels=np.arange(4))
    with pytest.raises(UserError, match=r"evaluation\.data.*12 channels of 8x8 pixels, the network takes 1"):
        run(tmp_path / "out", f"evaluation.data={tmp_path / 'bands.npz'}")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_store_that_was_there_is_told_in_the_report(tmp_path):
    small = ["transfer.size=40", "transfer.held_out=20", "transfer.synthesis.shard=20", "distillation.steps=4"]
    half = ["student={model: 'zoo:lenet5_half'}", "controls=[]", "compression={}", *small]
    loaded = load_recipe("digits-prune50", ["transfer.method=class-impressions", *half], seed=7)
    section = loaded.recipe.transfer
    request = TransferRequest(40, 10, 7, tmp_path / "store", section.options(), quiet=True)
    find_method("class-impressions").source(loaded.teacher(), request)

    def distill(name: str, *changes: str, store: str = "store") -> dict:
        recipe = load_recipe("digits-prune50", [*half, *changes])
        return Run(recipe, tmp_path / name, quiet=True, impressions=tmp_path / store).compress()

    report = distill("out")
    assert report["impressions"]["given"]["seed"] == 7
    said = remarks(report)[0]
    assert (
        "class-impressions, seed 7" in said
        and said.partition(". ")[0] in (tmp_path / "out" / "report.html").read_text()
    )
    with pytest.raises(UserError, match=r"transfer\.method real reads real images"):
        distill("real", "transfer.method=real", "transfer.data=digits")
    with pytest.raises(UserError, match="seed of this run's held-out impressions"):
        distill("again", store="out/impressions-held-out")


def test_accuracies_that_were_measured_stay_where_the_data_is_gone(finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    before = (out / "report.json").read_bytes()
    again = Run(load_recipe("digits-prune50", SMALL, 0), out, quiet=True)
    again.measured = False  # as without a folder of data
    assert again.compress()["accuracy"]["student"] is not None
    assert (out / "report.json").read_bytes() == before
    assert "has the accuracies already" in capsys.readouterr().err


def test_without_test_data_accuracy_is_null_and_agreement_is_on_neutral_images(tmp_path):
    report = run(tmp_path, "evaluation=null", "controls=[]")
    assert report["accuracy"] == {"teacher": None, "student": None, "student_int8": None}
    assert "procedural" in report["agreement_on"]
    assert report["agreement"] == report["agreement_neutral"]
    assert 0 <= report["agreement_held_out"] <= 1


def test_another_student_network_is_trained(tmp_path):
    report = run(
        tmp_path, "student.model=zoo:lenet5_half", "compression={}", "controls=[none]", "distillation.steps=250"
    )
    assert report["parameters"]["student"] == 35820
    assert report["pruning"] is None
    assert report["accuracy"]["student"] > report["controls"]["none"]["accuracy"] + 30


def test_a_student_with_other_classes_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="7 classes, the teacher 10"):
        run(tmp_path / "out", "student.model=zoo:lenet5_half", "student.arguments.num_classes=7", "compression={}")
    assert not (tmp_path / "out").exists()


def test_agp_reaches_its_sparsity(tmp_path):
    report = run(
        tmp_path,
        "compression.pruning.schedule={name: AGPPruner, interval: 4, total_times: 5}",
        "controls=[]",
    )
    assert report["parameters"]["student"] == 35820


def test_the_users_own_network_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        convolution = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())\n"
        "        self.features = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(4))\n"
        "        self.head = nn.Linear(128, 5)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.features(x).flatten(1))\n"
    )
    recipe = {
        "name": "mine",
        "teacher": {"model": "mine.py:Net", "input": {"shape": [1, 20, 20]}},
        "transfer": {"size": 60, "held_out": 20, "synthesis": {"max_steps": 5}},
        "compression": {"pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], "steps": 5}},
        "distillation": {"steps": 5},
        "controls": [],
    }
    (tmp_path / "mine.yml").write_text(json.dumps(recipe))
    report = Run(load_recipe(str(tmp_path / "mine.yml")), tmp_path / "out", quiet=True).compress()
    assert report["classifier"] == "head"
    said, worth = remarks(report)  # nothing of its BatchNorm, whose statistics are of no images
    assert said.startswith("Agreement on procedural images")
    assert worth.startswith("In ") and "below agreement on test data" in worth
    recipe["distillation"]["features"] = "auto"  # its one hidden layer is pruned: what is left of it is matched
    (tmp_path / "auto.yml").write_text(json.dumps(recipe))
    matched = Run(load_recipe(str(tmp_path / "auto.yml")), tmp_path / "auto", quiet=True).compress()
    assert len(remarks(matched)) == 2 and matched["history"]["features"] == [["features.1", "features.1"]]
    with open(tmp_path / "mine.py", "a") as file:
        file.write("class Other(Net):\n    def __init__(self):\n        super().__init__()\n")
        file.write("        self.layers, self.features = self.features, nn.Identity()\n")
        file.write("    def forward(self, x):\n        return self.head(self.layers(x).flatten(1))\n")
    other = {**recipe, "student": {"model": "mine.py:Other"}, "compression": {}}
    (tmp_path / "other.yml").write_text(json.dumps(other))
    unmatched = Run(load_recipe(str(tmp_path / "other.yml")), tmp_path / "other", quiet=True).compress()
    (said,) = [each for each in remarks(unmatched) if "features is auto" in each]
    assert "no hidden layer of one name and width" in said and said in (tmp_path / "other" / "report.html").read_text()
    network = load_network(tmp_path / "out" / "student.json")
    assert network.features[0].out_channels == 4
    assert np.isfinite(network(torch.rand(2, 1, 20, 20)).detach().numpy()).all()


LIVE = (
    "transfer.method=zskt",
    "transfer.width=4",
    "transfer.student_steps=5",
    "transfer.generator_steps=1",
    "transfer.memory=200",
    "transfer.new_images=64",
    "transfer.figures=40",
    "transfer.filling=2",
    "compression.pruning.pruner=TaylorPruner",
    "controls=[none]",
)


def test_a_live_source_is_what_it_had_become_when_later_stages_are_run_again(tmp_path: Path) -> None:
    """Calibration and scores see its images: those of the trained generator, whichever process asks for them."""
    changes = [*(change for change in SMALL if "synthesis" not in change), *LIVE]

    def live_run(out: Path) -> None:
        Run(load_recipe("digits-prune50", changes), out, quiet=True).compress()

    live_run(tmp_path / "whole")

    def bytes_of(out: Path) -> dict[str, str]:
        paths = [*out.glob("state/*.safetensors"), out / "student-int8.onnx", out / "student.onnx"]
        return {path.name: sha256_of_file(path) for path in paths}

    expected = bytes_of(tmp_path / "whole")
    for stage in ("student-quantized", "control-none"):
        out = Path(shutil.copytree(tmp_path / "whole", tmp_path / stage))
        for name in ("student-int8.onnx", "report.json", f"state/{stage}.json"):
            (out / name).unlink()
        live_run(out)
        assert bytes_of(out) == expected, stage


def test_dead_leaves_as_the_images_and_as_a_control(tmp_path):
    changes = ["transfer={method: procedural}", "compression.quantization=null"]
    report = run(tmp_path, *changes, "controls=[noise, leaves]")
    assert report["data_free"] and report["impressions"] is None
    assert [control["label"] for control in report["controls"].values()] == [
        "distilled on noise",
        "distilled on leaves",
    ]
    assert "dead leaves in the place of the images" in report["controls"]["leaves"]["what"]
    assert tables(report)[0].columns[-1] == "distilled on leaves"
    # The same images by another stream of random numbers: a student as good as the recipe's own.
    gap = report["accuracy"]["student"] - report["controls"]["leaves"]["accuracy"]
    assert abs(gap) < 10
