"""The command line as a user starts it: exit codes, one sentence for a mistake, stop and resume."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers import (
    cli_command,
    digits_network,
    finished_shards,
    is_one_sentence,
    run_cli,
    same_store,
    shard_hashes,
    start_cli,
    wait_for,
)

from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import export_onnx
from zskd_nni.models.serialization import save_network
from zskd_nni.recipes.load import load_recipe, packaged_names, recipe_text
from zskd_nni.synthesis import ImpressionStore

RECIPE = "digits-prune50"
COMMANDS = ["demo", "compress", "synthesize", "distill", "evaluate", "show", "recipes", "train-teacher", "search"]
COMMANDS += ["reproduce", "results"]
OF_RECIPES = "--out --seed --set --scale"
OF_DATA = "--data-root --download"
OF_MACHINES = "--device --threads --quiet"
SIZE = 120
SET = ["transfer.synthesis.shard=10", "transfer.synthesis.max_steps=40", "transfer.preset=paper"]


def synthesize(out: Path, *more: object) -> list[object]:
    changes = [argument for change in SET for argument in ("--set", change)]
    return ["synthesize", RECIPE, "--out", out, "--size", SIZE, *changes, "--threads", 1, "--quiet", *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command must leave, made by the library in this process."""
    folder = tmp_path_factory.mktemp("cli") / "store"
    loaded = load_recipe(RECIPE, [*SET, f"transfer.size={SIZE}"])
    section = loaded.recipe.transfer
    request = TransferRequest(SIZE, 1, loaded.recipe.seed, folder, section.options(), quiet=True)
    find_method("zskd").source(loaded.teacher(), request)
    return folder


# Help and usage.


def test_version() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"zskd-nni {version('zskd_nni')}\n", "")


def test_help_of_every_command() -> None:
    calls = [[], *([command] for command in COMMANDS)]
    running = [
        subprocess.Popen(cli_command(*call, "--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for call in calls
    ]
    texts = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running)
    assert all(error == "" for _, error in texts)
    assert all(f" {command} " in texts[0][0] for command in COMMANDS)
    for command, (text, _) in zip(COMMANDS, texts[1:], strict=True):
        assert f"Usage: zskd-nni {command}" in text or f"zskd_nni {command}" in text
        assert len(text.splitlines()) > 5
    assert "--set KEY.PATH=VALUE" in " ".join(texts[2][0].split())
    lines = [line.replace("[ARGS]...", "") for text, _ in texts for line in text.splitlines()]
    assert all(len(line) <= 80 and "..." not in line for line in lines), "nothing is cut"
    options = {
        "demo": "--out --seed --threads --quiet",
        "compress": f"{OF_RECIPES} {OF_DATA} {OF_MACHINES} --dry-run --impressions --twin",
        "synthesize": f"{OF_RECIPES} {OF_DATA} {OF_MACHINES} --size",
        "distill": f"{OF_RECIPES} {OF_DATA} {OF_MACHINES} --impressions",
        "evaluate": f"--data --split --fit {OF_DATA}",
        "show": "--out --count",
        "recipes": "",
        "train-teacher": f"--out --seed --epochs --validation {OF_DATA} {OF_MACHINES}",
        "search": f"{OF_RECIPES} --data-root {OF_MACHINES} --portal --port",
        "reproduce": f"--cell --seed --scale --out --results --list {OF_DATA} {OF_MACHINES}",
        "results": "--results --out",
    }
    for command, (text, _) in zip(COMMANDS, texts[1:], strict=True):
        shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        assert sorted(shown) == sorted([*options[command].split(), "--help"]), command


def test_no_command_shows_the_commands() -> None:
    result = run_cli()
    assert "synthesize" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["nothing"], ["synthesize"], ["show", "x", "--count", "0"], ["recipes", "--x"]])
def test_wrong_usage(arguments: list[str]) -> None:
    result = run_cli(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "Error" in result.stderr


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "digits-prune5", "--out", "o"], "did you mean digits-prune50"),
        (["compress", RECIPE, "--out", "o", "--set", "distillation.stesp=3"], "did you mean 'steps'"),
        (["synthesize", RECIPE, "--out", "o", "--device", "tpu", "--size", 5], "--device is cpu, cuda or cuda:N"),
        (["synthesize", RECIPE, "--out", "/proc/o", "--size", 5], "/proc/o"),
        (["show", "absent"], "is not a store of impressions"),
        (["evaluate", "absent.json", "--data", "digits"], "no file absent.json"),
        (["recipes", "absent"], "no recipe 'absent'"),
        (["train-teacher", "lenet6", "--out", "o"], "lenet6"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path: Path, arguments: list[object], message: str) -> None:
    result = run_cli(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert is_one_sentence(result.stderr), result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "o").exists(), "a mistake leaves nothing behind"


def test_a_factory_that_fails_at_length_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def net():\n    raise RuntimeError('first line\\nsecond line')\n")
    change = "teacher={model: 'net.py:net', input: {shape: [1, 8, 8]}}"
    (tmp_path / "recipe.yml").write_text(recipe_text(RECIPE)[0])
    result = run_cli("synthesize", "recipe.yml", "--out", "o", "--set", change, cwd=tmp_path)
    assert result.returncode == 2
    assert is_one_sentence(result.stderr), result.stderr


def test_a_path_at_the_beginning_keeps_its_letters(tmp_path: Path) -> None:
    assert "absent is not a store" in run_cli("show", "absent", cwd=tmp_path).stderr


# Recipes.


def test_recipes_are_listed_and_printed() -> None:
    listed = run_cli("recipes")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == packaged_names()
    printed = run_cli("recipes", RECIPE)
    assert printed.stdout == recipe_text(RECIPE)[0]


# Synthesis.


@pytest.mark.slow
def test_synthesize_resume_and_show(tmp_path: Path, undisturbed: Path) -> None:
    store = tmp_path / "store"
    first = run_cli(*synthesize(store))
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert f"{SIZE} impressions in {store}" in first.stdout
    assert same_store(undisturbed, store), "the command line and the library make the same"

    inodes = {path.name: path.stat().st_ino for path in store.glob("shard-*")}
    (store / "shard-00003.safetensors").unlink()
    again = run_cli(*synthesize(store))
    assert again.returncode == 0
    assert same_store(undisturbed, store)
    changed = {path.name for path in store.glob("shard-*") if path.stat().st_ino != inodes[path.name]}
    assert changed <= {"shard-00003.safetensors"}

    other = run_cli(*synthesize(store, "--seed", 1))
    assert other.returncode == 2
    assert is_one_sentence(other.stderr)
    assert "seed is 0 there, 1 here" in other.stderr
    assert same_store(undisturbed, store)

    picture = tmp_path / "picture.png"
    shown = run_cli("show", store, "--out", picture, "--count", 20)
    assert shown.returncode == 0, shown.stderr
    from PIL import Image

    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
        assert len(image.convert("L").getcolors()) > 50


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_and_resume(tmp_path: Path, undisturbed: Path, signum: int, code: int) -> None:
    store = tmp_path / "store"
    process = subprocess.Popen(
        cli_command(*synthesize(store)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: finished_shards(store) >= 2, 120)
    process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert error.count("\n") == 1
    assert signal.Signals(signum).name in error
    assert "the same command continues" in error
    made = finished_shards(store)
    assert 2 <= made < SIZE // 10
    assert not list(store.glob(".*.tmp"))
    before = {path.name: path.stat().st_ino for path in store.glob("shard-*")}
    again = run_cli(*synthesize(store))
    assert again.returncode == 0
    assert same_store(undisturbed, store)
    assert all((store / name).stat().st_ino == inode for name, inode in before.items())


@pytest.mark.slow
def test_disk_full(tmp_path: Path, undisturbed: Path) -> None:
    """A limit on file sizes stands in for a full disk: the manifest fits, a shard does not."""
    store = Path(shutil.copytree(undisturbed, tmp_path / "store"))
    (store / "shard-00005.safetensors").unlink()
    good = shard_hashes(store)
    limit = 10_000
    assert (store / "manifest.json").stat().st_size < limit < (store / "shard-00000.safetensors").stat().st_size
    result = start_cli(*synthesize(store), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 2
    assert is_one_sentence(result.stderr), result.stderr
    assert "shard-00005" in result.stderr
    assert "What was finished before is kept" in result.stderr
    assert shard_hashes(store) == good, "nothing is lost and no piece is left"
    opened = ImpressionStore.open(store)
    assert opened.missing() == [5]
    assert len(opened.read(4)) == 10
    assert run_cli(*synthesize(store)).returncode == 0
    assert same_store(undisturbed, store)


@pytest.mark.slow
def test_a_second_command_on_the_folder(tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = synthesize(store, "--set", "transfer.synthesis.max_steps=400")
    first = subprocess.Popen(cli_command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: finished_shards(store) >= 1, 120)
        second = run_cli(*arguments)
        assert first.poll() is None
        assert second.returncode == 2
        assert is_one_sentence(second.stderr)
        assert "Another run is at work" in second.stderr
    finally:
        first.kill()
        first.communicate()


# Evaluation.


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, spec, network = tmp_path_factory.mktemp("student"), InputSpec((1, 32, 32)), digits_network().eval()
    export_onnx(network, spec, folder / "student.onnx", torch.rand(8, 1, 32, 32))
    description = {"shape": [1, 32, 32], "low": 0.0, "high": 1.0}
    save_network(
        network, "zoo:lenet5", {}, folder / "student.safetensors", folder / "student.json", extra={"input": description}
    )
    return folder


def test_a_folder_of_a_run_takes_no_store(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    result = run_cli(*synthesize(tmp_path))
    assert result.returncode == 2 and is_one_sentence(result.stderr)
    assert "is the folder of a run" in result.stderr


def test_real_images_are_stored_nowhere(tmp_path: Path) -> None:
    real = ["--set", "transfer.method=real", "--set", "transfer.data=digits"]
    result = run_cli(*synthesize(tmp_path / "out", *real))
    assert result.returncode == 0, result.stderr
    assert "real stores nothing" in result.stdout


def test_one_left_over_variable_of_torchrun_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert run_cli("recipes").returncode == 0


def test_evaluate(student: Path) -> None:
    result = run_cli("evaluate", student, "--data", "digits")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "on 360 images of digits" in lines[0]
    assert float(lines[0].split("accuracy ")[1].split(" %")[0]) > 97
    assert "agreement 100.00 %" in lines[1]
    assert "images of digits: 8x8 resized to 32x32" in result.stderr
    padded = run_cli("evaluate", student, "--data", "digits", "--fit", "pad")
    assert "8x8 padded to 32x32" in padded.stderr and padded.stdout != result.stdout
    for fit, message in (("exact", "say how they are fitted"), ("stretch", "--fit is exact, pad, resize, crop")):
        refused = run_cli("evaluate", student, "--data", "digits", "--fit", fit)
        assert refused.returncode == 2 and message in refused.stderr


def test_evaluate_of_an_onnx_file(student: Path, tmp_path: Path) -> None:
    """By onnxruntime; its value range is that of the description beside it, and [0, 1] without one."""
    expected = run_cli("evaluate", student, "--data", "digits").stdout.splitlines()[1]
    share = expected.partition("accuracy ")[2].partition(" %")[0]
    for file in (student / "student.onnx", Path(shutil.copy(student / "student.onnx", tmp_path / "lone.onnx"))):
        result = run_cli("evaluate", file, "--data", "digits")
        assert result.stdout == f"{file}: accuracy {share} % on 360 images of digits\n", result.stderr

    network, wide = digits_network().eval(), InputSpec((1, 32, 32), 0.0, 255.0, (0.0,), (255.0,))
    export_onnx(network, wide, tmp_path / "wide-int8.onnx", 255 * torch.rand(8, 1, 32, 32))
    description = {"input": {"shape": [1, 32, 32], "low": 0, "high": 255}}
    (tmp_path / "wide.json").write_text(json.dumps(description))
    assert f"accuracy {share} %" in run_cli("evaluate", tmp_path / "wide-int8.onnx", "--data", "digits").stdout

    (tmp_path / "wide.json").write_text(json.dumps({"input": {"shape": [1, 28, 28]}}))
    (tmp_path / "text.onnx").write_text("no network")
    other = torch.onnx.export(torch.nn.Linear(3, 2), (torch.rand(1, 3),), dynamo=True, verbose=False)
    assert other is not None
    other.save(str(tmp_path / "other.onnx"))
    for name, message in {
        "wide-int8": "takes images of shape (1, 32, 32), and",
        "text": "cannot be run by onnxruntime",
        "other": "must have one input, images (N, C, H, W)",
        "absent": "There is no file",
    }.items():
        refused = run_cli("evaluate", tmp_path / f"{name}.onnx", "--data", "digits")
        assert refused.returncode == 2 and is_one_sentence(refused.stderr), refused.stderr
        assert message in refused.stderr


def test_evaluate_without_data(student: Path) -> None:
    result = run_cli("evaluate", student / "student.json", "--data", "mnist")
    assert result.returncode == 2
    assert is_one_sentence(result.stderr)
    assert "ZSKD_NNI_DATA" in result.stderr


def test_evaluate_of_a_changed_file(student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "student"))
    os.truncate(copy / "student.safetensors", 1000)
    result = run_cli("evaluate", copy, "--data", "digits")
    assert result.returncode == 2
    assert is_one_sentence(result.stderr), result.stderr


def test_evaluate_of_a_description_without_input(student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "student"))
    content = json.loads((copy / "student.json").read_text())
    del content["input"]
    (copy / "student.json").write_text(json.dumps(content))
    result = run_cli("evaluate", copy, "--data", "digits")
    assert result.returncode == 2
    assert is_one_sentence(result.stderr), result.stderr


def test_a_stop_before_the_work_begins_is_kept_in_mind(tmp_path: Path) -> None:
    """A signal while torch is still being imported."""
    store = tmp_path / "store"
    process = subprocess.Popen(
        cli_command(*synthesize(store)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), 120)  # handlers are set long before
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert time.monotonic() - started < 60
    assert "Traceback" not in error
    assert finished_shards(store) == 0
