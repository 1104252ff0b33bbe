"""The data-free versions of NNI's examples in docs/nni-examples.md run unchanged except for smaller numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.training.metrics import agreement

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "nni-examples.md"
# Sizes, steps and rounds; nothing else of a block is changed.
SMALLER = {
    "epochs=30": "epochs=2",
    "size=8000": "size=32",
    '"max_steps": 100': '"max_steps": 3',
    "steps=6000": "steps=6",
    "steps=4000": "steps=3",
    "steps=3000": "steps=6",
    "steps=2000": "steps=6",
    "steps=1500": "steps=6",
    "steps=1000": "steps=3",
    "steps=500": "steps=3",
    "steps=100,": "steps=2,",
    "steps=100)": "steps=2)",
    "times=10": "times=2",
    '"training_steps": 300': '"training_steps": 2',
    '"training_steps": 1000': '"training_steps": 2',
    '"interval": 100': '"interval": 2',
    '"total_times": 30': '"total_times": 2',
    '"total_times": 10': '"total_times": 2',
    "warmup_step=200": "warmup_step=1",
    "cooldown_begin_step=1400": "cooldown_begin_step=5",
    '"quant_start_step": 60': '"quant_start_step": 1',
}


def sections() -> dict[str, list[tuple[str, str]]]:
    """Heading -> its blocks ``(language, text)``; what stands before the first heading is under ``""``."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^### ", "### \n" + DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        found[heading.strip()] = blocks
    return found


SECTIONS = sections()


def smaller(text: str) -> str:
    for number, less in SMALLER.items():
        text = text.replace(number, less)
    return text


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the first block leaves, in a folder of its own."""
    ((language, block),) = SECTIONS[""]
    assert language == "python"
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("examples")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        torch.manual_seed(0)
        exec(compile(smaller(block), str(DOCUMENT), "exec"), names)
    names["states"] = {name: copy.deepcopy(names[name].state_dict()) for name in ("lenet", "resnet")}
    return names


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def sparsity(masks: dict[str, dict[str, torch.Tensor]], name: str, target: str = "weight") -> float:
    return 1 - float(masks[name][target].float().mean())


def answers(names: dict[str, Any], network: torch.nn.Module, source: str = "source") -> float:
    """Agreement with the teacher on its impressions; every answer must be finite."""
    teacher = names["resnet_teacher" if source == "resnet_source" else "teacher"]
    images = names[source].images[:].float()
    with torch.no_grad():
        logits = network.eval()(names["spec"].normalise(images))
    assert torch.isfinite(logits).all()
    return agreement(logits, teacher(images))


def of_a_shrunken_resnet(names: dict[str, Any], network: torch.nn.Module, most: float = 0.5) -> None:
    assert parameters(network) < most * parameters(names["resnet"])
    assert 0 <= answers(names, network, "resnet_source") <= 1


def integer_weights(path: Path) -> int:
    """How many weights of a file are integers of 8 bits."""
    graph = onnx.load(str(path)).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return sum(int(torch.tensor(list(t.dims)).prod()) for t in graph.initializer if t.data_type in integers and t.dims)


def scales(quantization: Any) -> dict[str, set[str]]:
    """Which targets of which modules have a finite, positive scale."""
    found: dict[str, set[str]] = {}
    for path, targets in quantization.calibration.items():
        for target, entry in targets.items():
            assert (entry["scale"] > 0).all() and torch.isfinite(entry["scale"]).all()
            found.setdefault(path, set()).add(target)
    return found


def check_quick_start(names: dict[str, Any]) -> None:
    small = names["small"]
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (3, 8, 60)
    assert small.fc3.out_features == 10 and parameters(small) < 0.3 * parameters(names["lenet"])
    answers(names, small)


def check_speedup(names: dict[str, Any]) -> None:
    assert names["result"].model.conv1.out_channels == 3 and names["result"].max_logit_difference < 1e-4


def check_norms(names: dict[str, Any]) -> None:
    assert set(names["small_resnets"]) == {"L1NormPruner", "L2NormPruner", "FPGMPruner"}
    for network in names["small_resnets"].values():
        of_a_shrunken_resnet(names, network)


def check_level(names: dict[str, Any]) -> None:
    assert names["sparse"].sparsity == pytest.approx(0.8, abs=0.02)
    for layer in ("conv2", "fc1", "fc2", "fc3"):
        weight = names["sparse"].model.get_submodule(layer).weight
        assert float((weight == 0).float().mean()) > 0.6  # less than 0.8 where empty channels are gone
    assert answers(names, names["sparse"].model) > 0.3


def check_taylor(names: dict[str, Any]) -> None:
    assert names["taylor"].record["scored_on_images"] and names["taylor"].record["steps_under_masks"] == 3
    of_a_shrunken_resnet(names, names["taylor"].network)


def check_slim(names: dict[str, Any]) -> None:
    assert names["slim"].record["shrunk"] and names["slim"].record["max_logit_difference"] < 1e-4
    of_a_shrunken_resnet(names, names["slim"].network, most=0.95)


def check_scheduled(names: dict[str, Any]) -> None:
    assert [made.record["schedule"] for made in names["scheduled"].values()] == ["AGPPruner", "LinearPruner"]
    for made in names["scheduled"].values():
        of_a_shrunken_resnet(names, made.network)


def check_bert_pruning(names: dict[str, Any]) -> None:
    mask = names["movement_masks"]["fc1"]["weight"]
    blocks = mask.reshape(30, 4, 100, 4).permute(0, 2, 1, 3).reshape(3000, 16)
    assert ((blocks == 0).all(1) | (blocks == 1).all(1)).all()
    assert names["narrow"].fc1.out_features == 60
    answers(names, names["student"])
    answers(names, names["narrow"])


def check_qat(names: dict[str, Any]) -> None:
    found = scales(names["qat"])
    assert found["conv1"] == {"_input_0", "weight", "_output_0"} and found["relu3"] == {"_output_0"}
    assert answers(names, names["simulated"](names["qat"])) > 0.8


def check_onnx(names: dict[str, Any]) -> None:
    assert names["int8"].agreement >= 0.98 and names["int8"].bytes < names["int8"].float_bytes / 2
    assert integer_weights(Path("lenet-int8.onnx")) > 61000
    assert scales(names["ptq"])["fc3"] == {"_input_0", "weight", "_output_0"}
    assert names["ptq"].calibration["fc3"]["weight"]["quant_dtype"] == "int8"


def check_ptq(names: dict[str, Any]) -> None:
    found = scales(names["calibrated"])
    assert found["conv1"] == {"_input_0", "weight"} and found["pool2"] == {"_output_0"}
    assert answers(names, names["simulated"](names["calibrated"])) > 0.9


def check_lsq(names: dict[str, Any]) -> None:
    assert ("group1.0.conv1", "group1.0.bn2") in names["folds"]
    for quantization in names["lsq"].values():
        assert len(scales(quantization)) == 9 and quantization.folds == names["folds"]
        answers(names, names["simulated"](quantization), "resnet_source")


def check_dorefa(names: dict[str, Any]) -> None:
    assert set(names["dorefa"].calibration) == {"conv1", "conv2", "fc1", "fc2", "relu1", "relu2", "relu3"}
    answers(names, names["simulated"](names["dorefa"]))


def check_bnn(names: dict[str, Any]) -> None:
    network = names["simulated"](names["bnn"])
    answers(names, network)
    assert set(network.fc1.weight.sign().unique().tolist()) <= {-1.0, 0.0, 1.0}


def check_bert_quantization(names: dict[str, Any]) -> None:
    for quantization in names["linear"].values():
        assert scales(quantization) == {f"fc{n}": {"weight", "_output_0"} for n in (1, 2, 3)}
        assert answers(names, names["simulated"](quantization)) > 0.8


def check_pruning_and_distillation(names: dict[str, Any]) -> None:
    assert names["pd_fused"].record["schedule"] == "AGPPruner"
    of_a_shrunken_resnet(names, names["pd_fused"].network)
    chained = names["chained"]
    assert (chained.conv1.out_channels, chained.conv2.out_channels) == (3, 8)
    assert (chained.fc1.out_features, chained.fc2.out_features) == (36, 26)
    answers(names, names["chained"])


def check_all_three(names: dict[str, Any]) -> None:
    of_a_shrunken_resnet(names, names["fused"].network)
    assert names["fused"].record["agreement_after_shrinking"] >= 0.98
    assert len(names["quantized"].calibration["group2.0.conv1"]["weight"]["scale"].flatten()) == 16  # of 32
    assert integer_weights(Path("resnet-fused-int8.onnx")) > 15000
    ((language, recipe),) = [
        block for block in SECTIONS["Pruning, quantization and distillation"] if block[0] != "python"
    ]
    assert language == "yaml"
    Path("fusion.yml").write_text(recipe)
    less = [
        "transfer.size=32",
        "transfer.held_out=16",
        "transfer.synthesis.max_steps=3",
        "compression.pruning.schedule.interval=2",
        "compression.pruning.schedule.total_times=2",
        "compression.pruning.steps=6",
        "compression.quantization.steps=3",
        "distillation.steps=6",
        "controls=[]",
    ]
    report = Run(load_recipe("fusion.yml", less), Path("out"), quiet=True).compress()
    assert report["parameters"]["student"] < 0.5 * report["parameters"]["teacher"]
    assert report["data_free"] and report["agreement_onnx"] >= 0.98 and Path("out/student-int8.onnx").exists()


def check_config(names: dict[str, Any]) -> None:
    masks = [targets["weight"] for targets in names["group_masks"].values()]
    assert sum(int((mask == 0).sum()) for mask in masks) / sum(map(torch.numel, masks)) == pytest.approx(0.5, abs=0.01)
    entries = {entry["op_names"][0]: entry for entry in names["aligned"]}
    align = entries["group1.0.bn2"]["target_settings"]["weight"]["align"]
    assert align == {"module_name": "group1.0.conv1", "target_name": "weight", "dims": [0]}


def check_setting(names: dict[str, Any]) -> None:
    for target in ("p1", "p2"):
        mask = names["customized_masks"]["fc2"][target]
        assert sparsity(names["customized_masks"], "fc2", target) == pytest.approx(0.5, abs=0.01)
        assert (mask.all(1) | ~mask.any(1)).all()
    answers(names, names["student"])


def check_evaluator(names: dict[str, Any]) -> None:
    assert 0 <= names["share"] <= 1
    assert sparsity(names["masks"], "conv1") == pytest.approx(0.5)
    assert not names["student"].fc.weight.equal(names["resnet"].fc.weight)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Pruning Quickstart": check_quick_start,
    "Speedup Model with Mask": check_speedup,
    "Norm pruning": check_norms,
    "Level pruning": check_level,
    "Taylor pruning": check_taylor,
    "Slim pruning": check_slim,
    "Scheduled pruning": check_scheduled,
    "Pruning BERT on MNLI": check_bert_pruning,
    "Quantization Quickstart": check_qat,
    "Speeding up a quantized network": check_onnx,
    "Post-training quantization": check_ptq,
    "LSQ, and module fusion": check_lsq,
    "DoReFa": check_dorefa,
    "BNN": check_bnn,
    "Quantize BERT on GLUE": check_bert_quantization,
    "Pruning and distillation": check_pruning_and_distillation,
    "Pruning, quantization and distillation": check_all_three,
    "Compression Config Specification": check_config,
    "Compression Setting": check_setting,
    "Evaluators": check_evaluator,
}


def test_every_section_is_checked_and_every_number_that_is_made_smaller_is_there() -> None:
    assert set(SECTIONS) == {"", *CHECKS}
    code = "".join(text for blocks in SECTIONS.values() for language, text in blocks if language == "python")
    assert DOCUMENT.read_text().count("```python\n") == sum(
        language == "python" for blocks in SECTIONS.values() for language, _ in blocks
    )
    for number in SMALLER:
        assert number in code, number


@pytest.mark.parametrize("heading", CHECKS)
def test_a_twin_runs(heading: str, beginning: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(beginning["folder"])
    torch.manual_seed(0)
    names = dict(beginning)
    for language, block in SECTIONS[heading]:
        if language == "python":
            exec(compile(smaller(block), str(DOCUMENT), "exec"), names)
    CHECKS[heading](names)
    for name, state in beginning["states"].items():  # the twins work on copies
        assert all(torch.equal(value, beginning[name].state_dict()[key]) for key, value in state.items())
