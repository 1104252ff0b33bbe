"""``zskd-nni search``: a real NNI experiment on the digits, and what is refused before one starts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
import yaml
from helpers import cli_command, is_one_sentence, run_cli, start_cli, wait_for

from zskd_nni.compression.quantization.quantize import simulated
from zskd_nni.compression.quantization.serialization import load_quantization
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.search import space_check
from zskd_nni.pipeline.search.experiment import BEST, SEARCH, Search
from zskd_nni.pipeline.search.job import check_files_can_be_copied, file_hashes, relocated, relocated_choices
from zskd_nni.pipeline.search.nni_config import experiment_config, tuner_config
from zskd_nni.pipeline.search.nni_manager import is_running
from zskd_nni.pipeline.search.probe_set import load_probe, make_probe, save_probe
from zskd_nni.pipeline.search.space_check import check_pairs
from zskd_nni.pipeline.search.trial import JOB, PROBE, RECIPE, measure, run_trial
from zskd_nni.pipeline.search.trial_table import render_trials
from zskd_nni.pipeline.search.tuner import RememberingTuner
from zskd_nni.recipes.load import LoadedRecipe, check_recipe, load_recipe, recipe_text
from zskd_nni.recipes.search_space import check_space, corners, flat_parameters, pairs, with_parameters
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, write_json
from zskd_nni.runtime.run_identity import RUN_FORMAT
from zskd_nni.runtime.tensors import load_tensors
from zskd_nni.training.metrics import accuracy

ROOT = Path(__file__).parent.parent
RATIO = "compression.pruning.config_list.0.sparse_ratio"
INTERVAL = "compression.pruning.schedule.interval"


def pruning(ratio: float, steps: int) -> dict[str, Any]:
    return {
        "pruner": "L1NormPruner",
        "config_list": [{"op_names": ["conv1", "conv2"], "sparse_ratio": ratio}],
        "schedule": {"name": "AGPPruner", "interval": 1, "total_times": 2},
        "steps": steps,
    }


def tiny(**search: Any) -> dict[str, Any]:
    """Seconds of work. Of its grid two are too large, one fails, one is left."""
    return {
        "name": "tiny",
        "teacher": {"model": "zoo:lenet5", "weights": "zoo:lenet5-digits", "input": {"shape": [1, 32, 32]}},
        "transfer": {"method": "zskd", "size": 40, "held_out": 20, "synthesis": {"max_steps": 3, "shard": 40}},
        "compression": {"pruning": pruning(0.3, 20)},
        "distillation": {"steps": 5, "batch": 20, "warmup": 0},
        "evaluation": {"data": "digits"},
        "controls": [],
        "search": {
            "space": {
                "compression.pruning": {"_type": "choice", "_value": [pruning(0.3, 20), pruning(0.7, 2)]},
                INTERVAL: {"_type": "choice", "_value": [1, 10]},
            },
            "tuner": "GridSearch",
            "max_bytes": 170_000,
            "trials": 4,
            "concurrency": 2,
            "probe": 60,
            **search,
        },
    }


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def load(folder: Path, **search: Any) -> LoadedRecipe:
    return load_recipe(write(folder, tiny(**search)))


# The real thing.


def family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def listening(processes: list[psutil.Process]) -> list[tuple[str, int]]:
    found = []
    for process in processes:
        try:
            found += [c.laddr[:2] for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
    return found


def rows(out: Path) -> list[dict[str, Any]]:
    path = out / "trials.json"
    return json.loads(path.read_text())["trials"] if path.exists() else []


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if is_running(one)]


def other_addresses() -> list[str]:
    """Of this machine, beside loopback."""
    addresses = [entry.address for card in psutil.net_if_addrs().values() for entry in card if entry.family == 2]
    return [address for address in addresses if not address.startswith("127.")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_search_is_private_stops_whole_and_goes_on(tmp_path: Path) -> None:
    out, home = tmp_path / "with space" / "out", tmp_path / "home"
    home.mkdir()
    (tmp_path / "with space").mkdir()
    recipe = write(tmp_path, tiny())
    command = cli_command("search", recipe, "--out", out, "--threads", 1)
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "HTTP_PROXY": "http://127.0.0.1:9"}

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    seen: dict[int, psutil.Process] = {}
    sockets: set[tuple[str, int]] = set()

    def finished(count: int) -> bool:
        seen.update({one.pid: one for one in family(process.pid)})
        sockets.update(listening(list(seen.values())))
        assert process.poll() is None, process.communicate()
        return len(rows(out)) >= count

    try:
        wait_for(lambda: finished(0) and bool(sockets), 300)
        ((address, port),) = sockets
        assert address == "127.0.0.1"
        for other in other_addresses():
            with pytest.raises(OSError), socket.create_connection((other, port), timeout=5):
                pass
        session = requests.Session()
        session.trust_env = False
        assert session.get(f"http://127.0.0.1:{port}/api/v1/nni/check-status", timeout=20).status_code == 404
        assert session.get(f"http://127.0.0.1:{port}/", timeout=20).status_code == 404
        listed = out / "nni" / "nni-experiments" / ".experiment"
        wait_for(lambda: listed.exists() and b"prefixUrl" in listed.read_bytes(), 60)
        secret = json.loads(listed.read_text())["search-1"]["prefixUrl"]
        assert session.get(f"http://127.0.0.1:{port}/{secret}/api/v1/nni/check-status", timeout=20).ok
        assert not any(secret in " ".join(one.cmdline()) for one in alive(list(seen.values()))), "for all users to read"
        assert (out / "nni").stat().st_mode & 0o077 == 0

        wait_for(lambda: finished(1), 400)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=200)
    finally:
        process.kill()  # where the test failed; the rest of it ends by itself
    assert process.returncode == 130, error
    assert "the same command continues" in error
    assert "Traceback" not in error
    assert len(seen) >= 4, "manager, tuner, two trials"
    assert alive(list(seen.values())) == []
    assert {address for address, _ in sockets} == {"127.0.0.1"}
    before = rows(out)
    assert 1 <= len(before) < 4

    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    after = rows(out)
    assert after[: len(before)] == before
    assert not (home / "nni-experiments").exists()

    table = json.loads((out / "trials.json").read_text())
    assert [row["number"] for row in after] == [1, 2, 3, 4]
    found = {(row["parameters"]["compression.pruning"]["steps"], row["parameters"][INTERVAL]): row for row in after}
    assert len(found) == 4, "nothing was tried twice"
    assert {key: row["status"] for key, row in found.items()} == {
        (20, 1): "over budget",
        (20, 10): "over budget",
        (2, 1): "done",
        (2, 10): "failed",
    }
    best, failed = found[2, 1], found[2, 10]
    assert "steps (2) must be at least" in failed["reason"]
    assert failed["reason"] in done.stderr + error + done.stdout
    assert "\n" not in failed["reason"]
    assert table["best"] == best["number"]
    assert table["data_free"] is True
    assert best["bytes"] <= 170_000 < found[20, 1]["bytes"]
    assert best["value"] == pytest.approx(best["objective"], abs=1e-4)
    assert found[20, 1]["value"] < -1
    assert f"{best['number']} *" in done.stdout
    assert "is measured on the probe set" in done.stdout

    # The best recipe makes the very student of its trial, and keeps what the search left out.
    chosen = load_recipe(str(out / "best.yml"))
    assert chosen.recipe.search is None
    assert chosen.recipe.selected_on == "a search over 4 trials: agreement on its probe set"
    assert chosen.recipe.evaluation is not None
    report = Run(chosen, tmp_path / "best", quiet=True).compress()
    assert report["accuracy"]["student"] is not None
    again, _ = load_tensors(tmp_path / "best" / "student.safetensors")
    first, _ = load_tensors((out / best["file"]).parent / "student.safetensors")
    assert all(torch.equal(again[name], value) for name, value in first.items())

    # A finished search starts nothing.
    started = time.monotonic()
    assert Search(load_recipe(recipe), out, quiet=True).run() == table
    assert time.monotonic() - started < 5
    with pytest.raises(UserError, match=r"belongs to another search \(.*max_bytes"):
        Search(load(tmp_path, max_bytes=5), out, quiet=True).run()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_search_leaves_nobody(tmp_path: Path) -> None:
    """Neither SIGINT nor SIGTERM is there to be heard: the manager sees that its parent is gone."""
    recipe = write(tmp_path, tiny())
    process = subprocess.Popen(
        cli_command("search", recipe, "--out", tmp_path / "out", "--threads", 1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen: dict[int, psutil.Process] = {}

    def trials_run() -> bool:
        seen.update({one.pid: one for one in family(process.pid)})
        return len(list((tmp_path / "out").glob("trials/*/run.json"))) > 0

    wait_for(trials_run, 400)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(list(seen.values())), 200)


# What is refused.


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "must name at least one key path"),
        ({RATIO: [0.3, 0.7]}, f"{RATIO} needs _type and _value"),
        ({RATIO: {"_type": "unifrom", "_value": [0, 1]}}, "no _type 'unifrom'; did you mean 'uniform'"),
        ({RATIO: {"_type": "choice", "_value": []}}, "_value must be a list that is not empty"),
        ({RATIO: {"_type": "choice", "_value": [0.3, 0.3]}}, "names a choice twice"),
        ({RATIO: {"_type": "uniform", "_value": [0.7, 0.3]}}, "lower bound must be less"),
        ({RATIO: {"_type": "uniform", "_value": [0.3]}}, "uniform takes 2 numbers, not 1"),
        ({RATIO: {"_type": "loguniform", "_value": ["1e-3", 1]}}, r"YAML reads 1e-3 as text; write 1\.0e-3"),
        ({RATIO: {"_type": "loguniform", "_value": [0, 1]}}, "needs a positive lower bound"),
        ({RATIO: {"_type": "quniform", "_value": [0, 1, 0]}}, "step must be positive"),
        ({RATIO: {"_type": "normal", "_value": [0, -1]}}, "standard deviation must be positive"),
        ({RATIO: {"_type": "randint", "_value": [0.5, 3]}}, "randint takes whole numbers"),
        ({RATIO: {"_type": "uniform", "_value": [0.1, 0.2], "_valu": 3}}, "unknown key '_valu'"),
        (
            {"a": {"_type": "choice", "_value": [{"_name": "x", "b": {"_type": "no", "_value": [1]}}]}},
            r"a\.x\.b: .*'no'",
        ),
    ],
)
def test_what_is_no_search_space(tmp_path: Path, space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, space=space)
    assert "search.space" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"space": {"transfer.sise": {"_type": "choice", "_value": [1]}}},
            "transfer.sise: with 1, .*did you mean 'size'",
        ),
        ({"space": {RATIO: {"_type": "uniform", "_value": [0.3, 1.5]}}}, "with 1.5, .*sparsity lies in"),
        ({"space": {RATIO.replace("0", "3"): {"_type": "choice", "_value": [0.3]}}}, "list of 1; '3' is no index"),
        (
            {"space": {"compression.pruning.config_list.0.op_names": {"_type": "choice", "_value": [["conv9"]]}}},
            "search.space.compression.pruning.config_list.0.op_names: with .*conv9",
        ),
        ({"tuner": "TPEE"}, "no tuner 'TPEE' for recipes; did you mean TPE"),
        ({"tuner": {"name": "TPE", "class_args": {"optimize_mode": "minimize"}}}, "a search maximises"),
        ({"tuner": {"name": "TPE", "class_args": {"sede": 3}}}, "TPE refuses its arguments.*sede"),
        (
            {"training_service": {"platform": "remote", "machine_list": []}},
            r"call back to this machine.*--portal.*nni_manager_ip: 127\.0\.0\.1",
        ),
        ({"training_service": {}}, "training_service names no platform"),
        (
            {"training_service": {"platform": "local", "use_active_gpu": "nonsense"}},
            "training_service: .*use_active_gpu",
        ),
        ({"training_service": {"platform": "local", "foo": 1}}, "training_service: .*foo"),
        ({"tuner": {"class_name": "a.B", "code_directory": "/nowhere"}}, "search.tuner: .*there is no /nowhere"),
        ({"tuner": {"name": "TPE", "class_args": [1]}}, "class_args is a mapping"),
        ({"objective": "accuracy"}, "accuracy is measured on test data; name it in evaluation.data"),
    ],
)
def test_what_is_known_beforehand(tmp_path: Path, search: dict[str, Any], message: str) -> None:
    loaded = load_recipe(write(tmp_path, tiny(**search)), ["evaluation=null"])
    with pytest.raises(UserError, match=message) as caught:
        Search(loaded, tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


BETAS = {"_type": "choice", "_value": [[1.0], [1.0, 0.1]]}
METHODS = {"_type": "choice", "_value": ["zskd", "sts"]}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"transfer.method": METHODS, "transfer.targets.betas": BETAS},
            "transfer.targets.betas: no value of it goes with 'sts' at transfer.method .*unknown key 'targets.betas'.*"
            "nest transfer.targets.betas under the choices of transfer.method",
        ),
        (
            {"transfer.targets.betas": BETAS, "transfer.method": METHODS},
            "transfer.targets.betas: no value of it goes with 'sts' at transfer.method",
        ),
        (
            {
                "transfer.method": {"_type": "choice", "_value": [{"_name": "zskd"}, {"_name": "sts"}]},
                "transfer.targets": {"_type": "choice", "_value": [{"_name": {}, "transfer.targets.betas": BETAS}]},
            },
            "transfer.targets: no value of it goes with 'sts' at transfer.method",
        ),
        (
            {
                "compression.pruning.steps": {"_type": "randint", "_value": [2, 21]},
                INTERVAL: {"_type": "quniform", "_value": [4, 10, 2]},
            },
            f"{INTERVAL}: no value of it goes with 2 at compression.pruning.steps .*; narrow one of the two",
        ),
    ],
)
def test_what_never_goes_together_is_known_beforehand(tmp_path: Path, space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Search(load(tmp_path, space=space), tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("search.space.")
    assert not (tmp_path / "out").exists()


def test_what_goes_together_with_some_value_is_left_to_the_trials(tmp_path: Path) -> None:
    Search(load(tmp_path), tmp_path / "out", quiet=True)  # one of its four fails
    nested = {
        "transfer.method": {
            "_type": "choice",
            "_value": [{"_name": "zskd", "transfer.targets.betas": BETAS}, {"_name": "sts"}],
        },
        "distillation.temperature": {"_type": "loguniform", "_value": [1.0, 20.0]},
    }
    Search(load(tmp_path, space=nested), tmp_path / "out", quiet=True)
    # What a nested choice brings is tried whole, not its first value alone.
    times = {"_name": 2, INTERVAL: {"_type": "choice", "_value": [10, 1]}}
    inner = {
        "compression.pruning.steps": {"_type": "choice", "_value": [2, 20]},
        "compression.pruning.schedule.total_times": {"_type": "choice", "_value": [times]},
    }
    Search(load(tmp_path, space=inner), tmp_path / "out", quiet=True)
    # The middle of a normal distribution says nothing of its other values.
    spread = {
        "compression.pruning.steps": {"_type": "normal", "_value": [20, 9]},
        INTERVAL: {"_type": "choice", "_value": [1, 15]},
    }
    content = tiny(space=spread)
    content["compression"]["pruning"]["steps"] = 40
    Search(load_recipe(write(tmp_path, content)), tmp_path / "out", quiet=True)


def test_the_recipes_that_are_checked_two_by_two_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def problem(flat: dict[str, Any]) -> str | None:
        checked.append(flat)
        return None if flat["b"] == 49 else "It is wrong."

    space = {name: {"_type": "choice", "_value": list(range(50))} for name in ("a", "b")}
    check_pairs(space, problem)
    assert len(checked) == 400 == len({str(flat) for flat in checked})
    monkeypatch.setattr(space_check, "MOST_RECIPES", 3000)
    checked.clear()
    with pytest.raises(UserError, match=r"space\.a: no value of it goes with 0 at b \(It is wrong\); nest a under"):
        check_pairs(space, problem)
    assert len(checked) == 2500, "each two once"


def test_the_first_example_of_the_page_can_begin(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "experiments.md").read_text()
    content = yaml.safe_load(recipe_text("digits-search")[0])
    content["search"] = yaml.safe_load(page.split("```yaml")[1].split("```")[0])["search"]
    source = {**content, "search": {**content["search"], "probe": 50}}
    search = Search(LoadedRecipe(check_recipe(source, "the page"), None, source), tmp_path / "out", quiet=True)
    assert len(search.section.space) == 4


def test_the_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    plain = run_cli("search", "digits-prune50", "--out", tmp_path / "out")
    assert plain.returncode == 2
    assert is_one_sentence(plain.stderr)
    assert "has no search section" in plain.stderr
    assert not (tmp_path / "out").exists()


def test_a_tuner_of_ones_own_is_looked_for_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "tuners").mkdir()
    section = load(tmp_path, tuner={"class_name": "mine.Tuner", "code_directory": "tuners"}).recipe.search
    assert section is not None
    assert tuner_config(section, 0, tmp_path)["codeDirectory"] == str(tmp_path / "tuners")
    with pytest.raises(UserError, match="code_directory names no folder"):
        tuner_config(section, 0, tmp_path / "tuners")


def test_a_search_knows_its_students_code(tmp_path: Path) -> None:
    content = {**tiny(), "student": {"model": "nets_of_mine.py:net"}}
    content["search"]["space"] = {"distillation.temperature": {"_type": "choice", "_value": [2, 4]}}
    code = """
    from zskd_nni.models.zoo import lenet5, lenet5_half  # {}

    def net():
        return {}()
    """
    prints = []
    for number, kind in enumerate(("lenet5", "lenet5", "lenet5_half")):
        (tmp_path / "nets_of_mine.py").write_text(textwrap.dedent(code.format(number, kind)))
        search = Search(load_recipe(write(tmp_path, content)), tmp_path / "out", quiet=True)
        prints.append((search.identity["student"], search.identity["code"]))
    assert prints[0][0] == prints[1][0] != prints[2][0]
    assert len({code for _, code in prints}) == 3


def test_unknown_search_keys_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'search\.trails'; did you mean 'trials'"):
        load(tmp_path, trails=3)


def test_training_services_pass_through_to_nni(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("")
    machine = {"host": "worker-1", "user": "me", "ssh_key_file": str(key), "python_path": "/opt/venv/bin"}
    service = {"platform": "remote", "nni_manager_ip": "127.0.0.1", "machine_list": [machine]}
    section = load(tmp_path, training_service=service).recipe.search
    assert section is not None
    search = Search(load(tmp_path, training_service=service), tmp_path / "out")
    config = experiment_config(section, tmp_path, tuner_config(section, search.seed), 3)
    assert type(config.training_service).__name__ == "RemoteConfig"
    assert config.training_service.machine_list[0].host == "worker-1"
    assert config.trial_command == "exec python3 -m zskd_nni trial ."
    wrong = section.model_copy(update={"training_service": {"platform": "local", "machine_list": []}})
    with pytest.raises(UserError, match=r"search\.training_service: .*machinelist"):
        experiment_config(wrong, tmp_path, tuner_config(section, 0), 3)


def remote(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    key = tmp_path / "key"
    key.write_text("")
    machine = {"host": "worker-1", "user": "me", "ssh_key_file": str(key)}
    return {"platform": "remote", "nni_manager_ip": "192.0.2.10", "machine_list": [machine], **settings}


def test_portal_lets_other_machines_call_back(tmp_path: Path) -> None:
    Search(load(tmp_path, training_service=remote(tmp_path)), tmp_path / "out", portal=True)


def test_a_mistyped_training_service_spoils_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"search\.training_service: .*machinelist"):
        Search(load(tmp_path, training_service={"platform": "local", "machine_list": []}), out, quiet=True).run()
    assert not out.exists()
    out.mkdir()
    Search(load(tmp_path), out, quiet=True)._claim()
    Search(load(tmp_path, training_service=remote(tmp_path)), out, quiet=True, portal=True)._claim()
    assert "training_service" not in read_json(out / SEARCH)["identity"]["search"]
    with pytest.raises(UserError, match=r"belongs to another search \(.*max_bytes"):
        Search(load(tmp_path, max_bytes=5), out, quiet=True)._claim()


# The parts.


def test_parameters_reach_their_places() -> None:
    space = {
        "transfer.method": {
            "_type": "choice",
            "_value": [
                {"_name": "zskd", "transfer.targets.betas": {"_type": "choice", "_value": [[1.0], [0.5]]}},
                {"_name": "sts"},
            ],
        },
        RATIO: {"_type": "quniform", "_value": [0.3, 0.7, 0.1]},
    }
    check_space(space)
    given = {"transfer.method": {"_name": "zskd", "transfer.targets.betas": [1]}, RATIO: 0.30000000000000004}
    flat = flat_parameters(space, given)
    assert flat == {"transfer.method": "zskd", "transfer.targets.betas": [1], RATIO: 0.3}
    source = tiny()
    changed = with_parameters(source, flat)
    assert changed["compression"]["pruning"]["config_list"][0]["sparse_ratio"] == 0.3
    assert changed["transfer"]["targets"] == {"betas": [1]}
    assert source == tiny(), "the original stays"
    tried = [(path, value) for path, value, _ in corners(space)]
    assert tried == [
        ("transfer.method", "zskd"),
        ("transfer.method", "sts"),
        ("transfer.targets.betas", [1.0]),
        ("transfer.targets.betas", [0.5]),
        (RATIO, pytest.approx(0.3)),
        (RATIO, pytest.approx(0.7)),
    ]


def test_two_by_two_is_what_may_meet_in_a_trial() -> None:
    def choice(*values: Any) -> dict[str, Any]:
        return {"_type": "choice", "_value": list(values)}

    deep = {
        "_name": "x",
        "b": choice(1, 2),
        "c": choice({"_name": "y", "d": choice(3)}, {"_name": "z", "e": choice(4)}),
    }
    space = {"a": choice(deep, {"_name": "w", "f": choice(5)}), "g": {"_type": "normal", "_value": [6, 1]}}
    check_space(space)
    met = {(one.path, other.path) for one, _, other, _ in pairs(space)}
    inner = {("b", "c"), ("b", "d"), ("b", "e")}
    assert met == inner | {pair[::-1] for pair in inner} | {("g", path) for path in "abcdef"}
    flats = [flat for one, _, other, tried in pairs(space) for flat in tried if (one.path, other.path) == ("b", "e")]
    assert flats == [{"a": "x", "b": 1, "c": "z", "e": 4}, {"a": "x", "b": 2, "c": "z", "e": 4}]
    assert all(list(flat) == sorted(flat) for *_, tried in pairs(space) for flat in tried), "a trial's order"
    assert next(flat for path, _, flat in corners(space) if path == "a") == {"a": "x", "b": 1, "c": "y", "d": 3}


def test_the_probe_set_is_the_teachers_alone(tmp_path: Path, digits_teacher: Teacher) -> None:
    probe = make_probe(digits_teacher, 300, seed=3)
    images, classes = probe.images, probe.labels
    assert images.dtype == torch.uint8
    assert images.shape == (300, 1, 32, 32)
    assert torch.equal(images, make_probe(digits_teacher, 300, seed=3).images)
    assert not torch.equal(images, make_probe(digits_teacher, 300, seed=4).images)
    assert len(classes.unique()) == 10
    assert classes.bincount(minlength=10).max() < 120, "no class rules"
    save_probe(tmp_path / PROBE, digits_teacher, 300, 3)
    loaded = load_probe(tmp_path / PROBE)
    assert torch.equal(loaded.labels, classes)
    assert torch.equal(digits_teacher(loaded.pixels(slice(None), digits_teacher.spec)).argmax(1), classes)


def test_a_trial_measures_its_deployable_file(tmp_path: Path, digits_teacher: Teacher) -> None:
    loaded = load(tmp_path)
    job = tmp_path / "job"
    job.mkdir()
    save_probe(job / PROBE, digits_teacher, 60, 0)
    (job / RECIPE).write_text(yaml.safe_dump(relocated(loaded, job)))
    settings: dict[str, Any] = {
        "space": {},
        "choices": [],
        "objective": "agreement",
        "device": "cpu",
        "threads": 1,
        "root": None,
        "max_bytes": 1000,
        "shared": str(tmp_path / "shared"),
        "trials": str(tmp_path / "trials"),
    }
    write_json(job / JOB, settings)
    over = measure(job, settings, {})
    assert over["status"] == "over budget"
    assert over["default"] == pytest.approx(-over["bytes"] / 1000)
    assert 0 <= over["objective"] <= 100
    within = measure(job, {**settings, "max_bytes": 10**6}, {})
    assert (within["status"], within["default"]) == ("done", pytest.approx(over["objective"]))
    real = measure(job, {**settings, "objective": "accuracy", "max_bytes": None}, {})
    assert real["default"] != within["default"]
    assert (tmp_path / "trials" / real["folder"] / "impressions").is_symlink(), "shared with trials of the same set"


def job_of(folder: Path, content: dict[str, Any], teacher: Teacher, probe: int = 60) -> tuple[Path, dict[str, Any]]:
    """A job's folder as a search writes it, and its settings."""
    job = folder / "job"
    job.mkdir()
    save_probe(job / PROBE, teacher, probe, 0)
    loaded = load_recipe(write(folder, content))
    (job / RECIPE).write_text(yaml.safe_dump(relocated(loaded, job)))
    settings: dict[str, Any] = {
        "choices": relocated_choices(loaded, content["search"]["space"], job),
        "objective": "agreement",
        "device": "cpu",
        "threads": 1,
        "root": None,
        "max_bytes": None,
    }
    return job, {**settings, "shared": str(folder / "shared"), "trials": str(folder / "trials")}


@pytest.mark.parametrize("quantizer", ["DoReFaQuantizer", "BNNQuantizer"])
def test_bits_without_an_integer_file_are_measured_in_simulation(
    tmp_path: Path, digits_teacher: Teacher, quantizer: str
) -> None:
    weights = {"op_names": ["conv2"], "target_names": ["weight"], "quant_dtype": "int8", "quant_scheme": "affine"}
    content = tiny()
    content["compression"] = {"quantization": {"quantizer": quantizer, "steps": 2, "config_list": [weights]}}
    job, settings = job_of(tmp_path, content, digits_teacher, 300)
    path, measured = "compression.quantization.config_list.0.quant_dtype", {}
    for bits in ("int8", "int2"):
        told = measured[bits] = measure(job, settings, {path: bits})
        assert told["note"] == f"{quantizer} is simulated, the bytes are those of the fp32 file"
        assert told["file"] == "student.onnx"
        folder = tmp_path / "trials" / told["folder"]
        assert told["bytes"] == (folder / "student.onnx").stat().st_size
        probe = load_probe(job / PROBE)
        images, classes = probe.pixels(slice(None), digits_teacher.spec), probe.labels
        network = simulated(load_quantization(folder / "state" / "student-quantized.json"))
        with torch.no_grad():
            answers = first_tensor(network(digits_teacher.spec.normalise(images)))
        assert told["objective"] == pytest.approx(accuracy(answers, classes), abs=1e-4)
        assert told["objective"] < 100, "the teacher itself, before it is quantized"
    if quantizer == "DoReFaQuantizer":
        assert measured["int2"]["objective"] < measured["int8"]["objective"]


def test_a_trial_says_whether_it_read_real_images(tmp_path: Path, digits_teacher: Teacher) -> None:
    content = tiny()
    content["transfer"]["data"] = "digits"
    content["transfer"]["method"] = "real"
    job, settings = job_of(tmp_path, content, digits_teacher)
    assert measure(job, settings, {})["data_free"] is False
    ats = {"transfer": {"method": "ats", "size": 40, "held_out": 20, "sources": ["digits"]}}
    assert measure(job, settings, ats)["data_free"] is False
    told = measure(job, settings, {"transfer": tiny()["transfer"]})
    assert (told["data_free"], told["note"]) == (True, None)


def test_a_trial_that_fails_says_so_as_well(
    tmp_path: Path, digits_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, settings = job_of(tmp_path, tiny(), digits_teacher)
    real = {"method": "real", "data": "nowhere.npz", "size": 40, "held_out": 20}
    settings["space"] = {"transfer": {"_type": "choice", "_value": [real]}}
    write_json(job / JOB, settings)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("nni.get_next_parameter", lambda: {"transfer": real})
    monkeypatch.setattr("nni.report_intermediate_result", lambda report: told.append(dict(report)))
    with pytest.raises(UserError, match=r"nowhere\.npz"):
        run_trial(job)
    assert [report["data_free"] for report in told] == [False, False]
    assert "nowhere.npz" in told[-1]["failed"]


@pytest.mark.parametrize("content", ["{}", "[]", '{"trials": 5}', '{"trials": [{}]}', '{"trials": [], "best": 1}'])
def test_a_damaged_table_of_trials_is_told(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    search = Search(load_recipe(write(tmp_path, tiny())), out, quiet=True)
    search._claim()
    (out / "trials.json").write_text(content)
    with pytest.raises(UserError, match=r"trials\.json is incomplete; remove it"):
        search.run()


def test_proposals_that_are_none_are_passed_over(tmp_path: Path) -> None:
    search = Search(load_recipe(write(tmp_path, tiny())), tmp_path, quiet=True)
    (tmp_path / "proposed.jsonl").write_bytes(b'[1]\n\xff\n{"a": 1}\n{"a"')
    assert search._history([]) == ([], [{"a": 1}])


def test_a_search_that_reads_real_images_says_so(tmp_path: Path) -> None:
    """Whatever the method of the recipe that is searched."""
    out = tmp_path / "out"
    out.mkdir()
    real = {"transfer.method": {"_type": "choice", "_value": ["zskd", "real"]}}
    content = {**tiny(space=real), "selected_on": "somewhere else"}
    search = Search(load_recipe(write(tmp_path, content)), out, quiet=True)
    plain = {"status": "done", "bytes": 150_000, "reason": None, "seconds": 1.0, "note": None}
    first = {**plain, "parameters": {"transfer.method": "zskd"}, "objective": 80.0, "data_free": True}
    second = {**plain, "parameters": {"transfer.method": "real"}, "objective": 90.0, "data_free": False}

    assert search._table([first])["data_free"] is True
    search._conclude(search._table([first]))
    assert "real images" not in (out / BEST).read_text()
    assert "real images" not in render_trials(search._table([first]))

    table = search._conclude(search._table([first, second]))
    assert (table["data_free"], table["best"]) == (False, 2)
    text = (out / BEST).read_text()
    assert "# It reads real images: NOT data-free.\n" in text
    assert (
        yaml.safe_load(text)["selected_on"] == "somewhere else; then a search over 2 trials: agreement on its probe set"
    )
    shown = render_trials(table).splitlines()
    assert [line.endswith("done; reads real images") for line in shown[2:4]] == [True, False]
    assert shown[-1] == "trial 2 reads real images: NOT data-free"

    table = search._conclude(search._table([{**first, "objective": 95.0}, second, second]))
    assert (table["data_free"], table["best"]) == (False, 1)
    assert (
        "# trials 2, 3 read real images, this one does not: the search is NOT data-free.\n" in (out / BEST).read_text()
    )

    measured = Search(load_recipe(write(tmp_path, tiny(objective="accuracy"))), out, quiet=True)
    table = measured._conclude(measured._table([{**first, "parameters": {}, "note": "DoReFa is simulated"}]))
    assert table["data_free"] is False
    text = (out / BEST).read_text()
    assert "on real images (digits, test split): NOT data-free" in text
    assert "# DoReFa is simulated.\n" in text
    assert yaml.safe_load(text)["selected_on"] == "a search over 1 trial: accuracy on digits, test split"
    assert "done; DoReFa is simulated" in render_trials(table)


def test_the_command_that_a_search_prints_runs_as_it_stands(tmp_path: Path) -> None:
    """From a folder with a space in its name, with the options that the search was given."""
    loaded, out = load(tmp_path, trials=1), tmp_path / "my search"
    out.mkdir()
    search = Search(loaded, out, quiet=True)
    search._claim()
    row: dict[str, Any] = {
        "id": "search-1/a",
        "status": "done",
        "reason": None,
        "given": {},
        "value": 80.0,
        "seconds": 1.0,
    }
    row |= {"parameters": {INTERVAL: 2}, "objective": 80.0, "bytes": 150_000, "data_free": True}
    write_json(out / "trials.json", search._table([row]))
    done = start_cli("search", "tiny.yml", "--out", "my search", "--data-root", "my data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, _, command = done.stdout.splitlines()[-1].partition("zskd-nni ")
    assert said.startswith("best: trial 1")
    words = shlex.split(command)
    assert words == ["compress", "my search/best.yml", "--out", "my search/best", "--data-root", "my data"]
    made = start_cli(*words, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (out / "best" / "student.onnx").exists()


def test_a_searched_method_gets_its_own_preset(tmp_path: Path) -> None:
    methods = {"_type": "choice", "_value": ["zskd", "ats"]}
    content = tiny(space={"transfer.method": methods})
    content["transfer"] = {"method": "zskd", "preset": "best", "size": 40, "held_out": 20}
    loaded = load_recipe(write(tmp_path, content))
    Search(loaded, tmp_path / "out", quiet=True)
    presets = [
        with_parameters(loaded.source, {"transfer.method": one})["transfer"].get("preset") for one in methods["_value"]
    ]
    assert presets == ["best", None], "none is the method's default"


def test_no_student_within_the_budget(tmp_path: Path) -> None:
    search = Search(load(tmp_path), tmp_path / "out", quiet=True)
    row = {"status": "over budget", "objective": 99.0, "bytes": 200_000, "reason": "", "parameters": {}, "seconds": 1.0}
    table = search._table([row, {**row, "bytes": 180_000}])
    assert table["best"] is None
    with pytest.raises(UserError, match=r"no student of 2 trials is as small as 170,000 bytes; .*trial 2.*180,000"):
        search._conclude(table)
    failed = {**row, "status": "failed", "objective": None, "bytes": None, "reason": "It broke."}
    with pytest.raises(UserError, match=r"No trial gave a result.*It broke"):
        search._conclude(search._table([failed]))


def test_the_best_is_within_the_budget_and_the_smaller_of_equals(tmp_path: Path) -> None:
    search = Search(load(tmp_path), tmp_path / "out", quiet=True)
    plain = {"reason": None, "parameters": {RATIO: 0.5}, "seconds": 1.0}
    table = search._table(
        [
            {"status": "over budget", "objective": 99.0, "bytes": 200_000, **plain},
            {"status": "done", "objective": 90.0, "bytes": 150_000, **plain},
            {"status": "done", "objective": 90.0, "bytes": 140_000, **plain},
            {"status": "failed", "objective": None, "bytes": None, **plain},
        ]
    )
    assert table["best"] == 3
    text = render_trials(table).splitlines()
    assert text[0].split() == ["trial", "sparse_ratio", "agreement", "bytes", "seconds", "status"]
    assert text[2].startswith("3 *")


def test_the_tuner_remembers(tmp_path: Path) -> None:
    space = {"a": {"_type": "choice", "_value": [1, 2, 3]}}
    proposed = tmp_path / "proposed.jsonl"
    known, again = [{"parameter": {"a": 1}, "value": 5.0}], [{"a": 2}]
    tuner = RememberingTuner({"name": "GridSearch", "classArgs": {}}, known, again, str(proposed))
    tuner.update_search_space(space)
    assert tuner.generate_multiple_parameters([0, 1, 2]) == [{"a": 2}, {"a": 3}], "one is known, and there are no more"
    assert proposed.read_text() == '{"a": 3}\n'
    tuner.receive_trial_result(0, {"a": 2}, 7.0)
    tuner.trial_end(0, True)
    tpe = RememberingTuner({"name": "TPE", "classArgs": {"seed": 1}}, known, again, str(proposed))
    tpe.update_search_space(space)
    first, second = tpe.generate_multiple_parameters([0, 1])
    assert (first, second["a"] in (2, 3)) == ({"a": 2}, True)
    tpe.receive_trial_result(0, first, 7.0)
    tpe.receive_trial_result(1, second, {"default": 3.0})


def test_paths_hold_where_a_recipe_is_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    content = tiny()
    content["teacher"] = {"model": "net.py:make", "weights": "w.safetensors", "input": {"shape": [1, 32, 32]}}
    for name in ("net.py", "w.safetensors"):
        (tmp_path / "recipes" / name).write_text("def make(): ...")
    loaded = load_recipe(write(tmp_path / "recipes", content))
    (tmp_path / "out").mkdir()
    moved = relocated(loaded, tmp_path / "out")
    assert moved["teacher"]["model"] == "../recipes/net.py:make"
    assert moved["teacher"]["weights"] == "../recipes/w.safetensors"
    assert moved["evaluation"] == {"data": "digits"}
    assert "search" not in moved
    # A teacher too large to ship is found in the current folder, which a trial's is not.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "large.safetensors").write_text("")
    content["teacher"]["weights"] = "zoo:large"
    found = relocated(load_recipe(write(tmp_path / "recipes", content)), tmp_path / "out")
    assert (tmp_path / "out" / found["teacher"]["weights"]).resolve() == tmp_path / "teachers" / "large.safetensors"


def test_carried_files_keep_apart(tmp_path: Path) -> None:
    content = tiny()
    names = {"t/model.safetensors": "teacher", "s/model.safetensors": "student", "my net-1.py": "def make(): ...\n"}
    names["probe.safetensors"] = "images"
    for name, text in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    content["teacher"] = {
        "model": "my net-1.py:make",
        "weights": "t/model.safetensors",
        "input": {"shape": [1, 32, 32]},
    }
    content["student"] = {"model": "zoo:lenet5_half", "weights": "s/model.safetensors"}
    content["evaluation"] = {"data": "probe.safetensors"}
    loaded, job = load_recipe(write(tmp_path, content)), tmp_path / "job"
    job.mkdir()
    (job / PROBE).write_text("the probe set")
    check_files_can_be_copied(loaded, {})
    carried = relocated(loaded, job, copy_files=True)
    file, _, factory = carried["teacher"]["model"].rpartition(":")
    assert factory == "make"
    assert Path(file).stem.isidentifier()
    assert Path(file).suffix == ".py"
    places = [carried["teacher"]["weights"], carried["student"]["weights"], file, carried["evaluation"]["data"]]
    assert [(job / place).read_text() for place in places] == list(names.values())
    assert all(place.startswith("files/") for place in places)
    assert [Path(place).suffix for place in places[:2]] == [".safetensors"] * 2
    assert (job / PROBE).read_text() == "the probe set"
    assert relocated(loaded, job, copy_files=True) == carried
    assert sorted(entry.name for entry in (job / "files").iterdir()) == sorted(Path(place).name for place in places)


NETWORKS = """from torch import nn


def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 10))


def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 10))
"""


def test_choices_may_name_files_beside_the_recipe(tmp_path: Path, digits_teacher: Teacher) -> None:
    """They hold in trials, whose recipe lies elsewhere, and in the recipe that the search leaves."""
    (tmp_path / "nets.py").write_text(NETWORKS)
    content = tiny(trials=2, max_bytes=None)
    del content["compression"]
    content["student"] = {"model": "zoo:lenet5_half"}
    choices = ["nets.py:narrow", "nets.py:wide", "zoo:lenet5_half"]
    content["search"]["space"] = {"student.model": {"_type": "choice", "_value": choices}}
    job, settings = job_of(tmp_path, content, digits_teacher)
    assert settings["choices"] == [
        {"path": "student.model", "value": name, "moved": f"../{name}"} for name in choices[:2]
    ]
    sizes = [measure(job, settings, {"student.model": name})["bytes"] for name in choices]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_a_search_over_files_leaves_a_recipe_that_finds_them(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETWORKS)
    content = tiny(trials=2, max_bytes=None)
    del content["compression"]
    content["student"] = {"model": "zoo:lenet5_half"}
    space = {"student.model": {"_type": "choice", "_value": ["nets.py:narrow", "nets.py:wide"]}}
    content["search"]["space"] = space
    out = tmp_path / "elsewhere" / "out"
    search = Search(load_recipe(write(tmp_path, content)), out, quiet=True)
    rows = [
        {"number": number, "status": "done", "parameters": {"student.model": name}, "objective": 50.0 + number}
        for number, name in enumerate(("nets.py:narrow", "nets.py:wide"), 1)
    ]
    out.mkdir(parents=True)
    search._conclude(search._table([{**row, "bytes": 1000, "data_free": True} for row in rows]))
    best = load_recipe(str(out / BEST))
    assert best.recipe.student is not None
    assert best.recipe.student.model == "../../nets.py:wide"
    assert sum(parameter.numel() for parameter in best.network(best.recipe.student).parameters()) == 16570
    # What a choice brings is part of what is searched.
    known = search.identity["files"]
    assert list(known) == ["nets.py:narrow", "nets.py:wide"]
    (tmp_path / "nets.py").write_text(NETWORKS.replace("16", "12"))
    again = Search(load_recipe(write(tmp_path, content)), out, quiet=True)
    assert again.identity["files"] != known
    write_json(out / SEARCH, {"format": RUN_FORMAT, "identity": search.identity})
    with pytest.raises(UserError, match=r"belongs to another search \(files\.nets\.py:narrow is"):
        again._claim()


def test_a_search_knows_the_files_that_its_trials_read(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETWORKS + "\n\ndef made(width):\n    return wide()\n")
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_text(name)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_text("one")
    content = tiny()
    del content["compression"]
    content["student"] = {"model": "nets.py:made"}
    content["transfer"] = {"method": "ats", "size": 40, "held_out": 20, "sources": ["a.npz"]}
    content["search"]["space"] = {
        "student.arguments.width": {"_type": "choice", "_value": [4, 8]},  # without it there is no network
        **sources(["a.npz"], ["b.npz", "images"]),
    }

    def identity(folder: Path) -> dict[str, Any]:
        return Search(load_recipe(write(folder, content)), tmp_path / "out", quiet=True).identity

    seen = [identity(tmp_path)]
    assert list(seen[0]["files"]) == ["a.npz", "b.npz", "images", "nets.py:made"]
    for name in ("a.npz", "images/1.png", "nets.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        seen.append(identity(tmp_path))
        assert seen[-1]["files"] != seen[-2]["files"], name
    assert seen[-1]["code"] != seen[0]["code"]
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=lambda *_: ["elsewhere"])
    assert identity(tmp_path / "elsewhere") == seen[-1]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("controls.0", "trials make no controls"),
        ("search.trials", "a trial searches nothing itself"),
        ("scales.cpu", "before it is searched"),
        ("evaluation.data", "no trial opens a real image"),
    ],
)
def test_what_trials_do_not_have_is_not_searched(tmp_path: Path, path: str, reason: str) -> None:
    content = tiny()
    content["search"]["space"] = {path: {"_type": "choice", "_value": ["digits", "mnist"]}}
    with pytest.raises(UserError, match=rf"search\.space\.{path} makes no difference to any trial: .*{reason}"):
        Search(load_recipe(write(tmp_path, content)), tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("transfer", "space"),
    [
        ({"method": "ats"}, {"transfer.sources": [["shapes"], ["typo.npz"]]}),
        ({"method": "real", "data": "digits"}, {"transfer.data": ["digits", "typo.npz"]}),
        ({"method": "real", "data": "typo.npz"}, {"distillation.batch": [20, 30]}),
    ],
)
def test_images_that_are_not_there_are_refused_beforehand(
    tmp_path: Path, transfer: dict[str, Any], space: dict[str, list[Any]]
) -> None:
    content = {**tiny(), "transfer": {**transfer, "size": 40, "held_out": 20}}
    content["search"]["space"] = {path: {"_type": "choice", "_value": values} for path, values in space.items()}
    with pytest.raises(UserError, match=r"transfer\.(data|sources\.0): there is no file or folder typo\.npz"):
        Search(load_recipe(write(tmp_path, content)), tmp_path / "out", quiet=True)


def test_files_of_choices_are_carried(tmp_path: Path) -> None:
    content = tiny()
    for name in ("a.safetensors", "b.npz"):
        (tmp_path / name).write_text(name)
    (tmp_path / "images").mkdir()
    space = {
        "transfer": {
            "_type": "choice",
            "_value": [
                {"_name": {"method": "ats", "size": 40, "held_out": 20}, **sources(["shapes", "b.npz"], ["shapes"])}
            ],
        },
        "student.weights": {"_type": "choice", "_value": ["a.safetensors", "zoo:lenet5-digits"]},
    }
    loaded, job = load_recipe(write(tmp_path, content)), tmp_path / "job"
    check_files_can_be_copied(loaded, space)
    first, second = relocated_choices(loaded, space, job, copy_files=True)
    assert first["path"] == "transfer.sources"
    assert first["moved"][0] == "shapes"
    assert (job / first["moved"][1]).read_text() == "b.npz"
    assert (second["path"], second["value"]) == ("student.weights", "a.safetensors")
    assert (job / second["moved"]).read_text() == "a.safetensors"
    assert list(file_hashes(loaded, space)) == ["a.safetensors", "b.npz"]
    space = sources(["images"])
    with pytest.raises(UserError, match=r"transfer\.sources\.0: .*images is a folder.*copies only files"):
        check_files_can_be_copied(loaded, space)


def sources(*choices: list[str]) -> dict[str, Any]:
    """A space over the sources of an arbitrary transfer set."""
    return {"transfer.sources": {"_type": "choice", "_value": list(choices)}}


def test_folders_are_not_carried(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    content = {**tiny(training_service=remote(tmp_path)), "evaluation": {"data": "images"}}
    loaded = load_recipe(write(tmp_path, content))
    for refuse in (
        lambda: check_files_can_be_copied(loaded, {}),
        lambda: relocated(loaded, tmp_path / "out", copy_files=True),
    ):
        with pytest.raises(UserError, match=r"evaluation\.data: .*images is a folder.*copies only files.*\.npz"):
            refuse()
    assert relocated(loaded, tmp_path / "out")["evaluation"]["data"] == "../images"
    search = Search(loaded, tmp_path / "out", portal=True, quiet=True)  # no trial measures on it
    assert search._trial_recipe().source["evaluation"] is None
    content["transfer"] = {"method": "ats", "size": 40, "held_out": 20, "sources": ["shapes", "images"]}
    with pytest.raises(UserError, match=r"transfer\.sources\.1: .*images is a folder"):
        Search(load_recipe(write(tmp_path, content)), tmp_path / "out", portal=True, quiet=True)
    assert not (tmp_path / "out").exists()
