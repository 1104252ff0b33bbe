"""The papers' tables at the smallest scale: every method end to end, records, sharing, resuming, the page."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import is_one_sentence
from typer.testing import CliRunner

from zskd_nni import cli
from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.sources import StoredSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5
from zskd_nni.recipes.load import load_recipe
from zskd_nni.research.reproduction import context as contexts
from zskd_nni.research.reproduction import run as running
from zskd_nni.research.reproduction import sources
from zskd_nni.research.reproduction.cells import METHODS, Cell, resolve
from zskd_nni.research.reproduction.context import PairContext, Workspace
from zskd_nni.research.reproduction.estimate import estimate_seconds
from zskd_nni.research.reproduction.page import group_records, mean_and_deviation, render_page, take_out_older
from zskd_nni.research.reproduction.pairs import PAIRS, PUBLISHED_STUDENT
from zskd_nni.research.reproduction.published import PUBLISHED, TARGETS
from zskd_nni.research.reproduction.records import NEEDED, read_record, read_records
from zskd_nni.research.reproduction.run import CellRun
from zskd_nni.research.reproduction.session import Selection, run_table
from zskd_nni.research.reproduction.sources import make_source
from zskd_nni.research.reproduction.tables import TABLES, Table, choose_cells, find_table
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, sha256_of_file
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.synthesis import ImpressionStore

ROOT = Path(__file__).resolve().parent.parent
SEED = 0


def workspace_in(folder: Path) -> Workspace:
    return Workspace(folder / "runs", folder / "results", quiet=True)


def call(*arguments: object) -> tuple[int, str]:
    """The command in this process; a user's mistake comes back as the sentence that is shown."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        return 2, f"Error: {result.exception}\n"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def at(folder: Path) -> list[object]:
    return ["--out", folder / "runs", "--results", folder / "results", "--threads", 1, "--quiet"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods on the digits, by the command."""
    folder = tmp_path_factory.mktemp("reproduce")
    code, output = call("reproduce", "digits", "--scale", "smoke", "--seed", SEED, *at(folder))
    assert code == 0, output
    return folder


def test_every_method_leaves_a_whole_record(digits: Path) -> None:
    records = read_records(digits / "results")
    assert {record["cell"] for record in records} == {cell.name for cell in TABLES["digits"].cells}
    assert {record["method"] for record in records} == set(METHODS)
    for record in records:
        assert set(NEEDED) <= set(record)
        assert (record["scale"], record["seed"], record["pair"]) == ("smoke", SEED, "digits")
        assert 0 <= record["accuracy"]["student"] <= 100
        assert record["accuracy"]["teacher"] == pytest.approx(98.89, abs=0.01)
        assert 0 <= record["agreement"] <= 1
        assert 0 <= record["calibration_error"]["student"] <= 1
        assert (record["mte"] is not None) == (
            record["method"] in ("zskt", "kd-at")
            or (record["method"] in ("zskd", "real-kd") and record["preset"] == "best")
        )
        assert record["data_free"] == (record["method"] not in ("real-kd", "real-labels", "kd-at"))
        assert set(record["seconds"]) == {"synthesis", "student", "evaluation", "total"}
        assert record["seconds"]["total"] == pytest.approx(
            sum(value for key, value in record["seconds"].items() if key != "total"), abs=0.02
        )
        assert record["provenance"]["seed"] == SEED
        assert record["selected_on"]
        if record["method"] == "none" or (
            record["method"] == "zskt" and record["preset"] != "best"
        ):  # the pair's recipe has no part in these
            assert "student" not in record["ingredients"]
        else:
            assert record["ingredients"]["student"]["steps"] == 12
    by_name = {record["cell"]: record for record in records}
    assert by_name["digits-zskd-best"]["ingredients"]["synthesis"]["start"] == "mixed"
    assert by_name["digits-zskd-paper"]["ingredients"]["synthesis"]["start"] == "uniform"
    assert by_name["digits-zskd-paper"]["ingredients"]["student"]["temperature"] == 20
    assert by_name["digits-zskd-best"]["ingredients"]["student"]["temperature"] == 4
    images = {name: record["impressions"] for name, record in by_name.items()}
    assert images["digits-zskd-best"] == 40
    assert images["digits-kd-at-10-a-class"] == 100
    assert images["digits-real-kd-best"] == images["digits-real-labels"] == 1437
    assert images["digits-zskt-paper"] is images["digits-noise"] is images["digits-none"] is None


def test_what_is_finished_is_not_run_again(digits: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*") if path.is_file() and path.name != ".lock"}
    code, output = call("reproduce", "digits", "--scale", "smoke", "--seed", SEED, *at(digits))
    assert (code, output.splitlines()) == (0, [f"records: {digits / 'results'}"])
    assert before == {path: path.stat().st_mtime_ns for path in before}
    code, output = call("reproduce", "digits", "--scale", "smoke", "--seed", SEED, "--list", *at(digits))
    lines = output.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[: len(TABLES["digits"].cells)]] == [
        f"{cell.name}-smoke" for cell in TABLES["digits"].cells
    ]
    assert all(line.endswith(" finished") for line in lines[: len(TABLES["digits"].cells)])
    assert "40 images, 12 steps" in output


def test_other_settings_are_run_again(digits: Path, tmp_path: Path) -> None:
    plan = resolve(Cell("digits", "zskd", "best", student={"steps": 3}), "smoke")
    context = PairContext("digits", workspace_in(digits))
    assert CellRun(plan, context, SEED).status() == "other settings"
    assert CellRun(plan, PairContext("digits", workspace_in(tmp_path)), SEED).status() == "not run"


def test_the_page_of_real_records(digits: Path, tmp_path: Path) -> None:
    code, output = call("results", "--results", digits / "results", "--out", tmp_path / "docs" / "page.md")
    assert code == 0, output
    page = (tmp_path / "docs" / "page.md").read_text()
    assert page == render_page(read_records(digits / "results"))
    for cell in TABLES["digits"].cells:
        record = read_record(digits / "results" / f"{cell.name}-smoke-seed0.json")
        dagger = "" if record["data_free"] else " †"
        row = f"| {cell.method}{dagger} | {cell.preset or '-'} | {cell.variant or '-'} |"
        assert row in page
        assert f"**{record['accuracy']['student']:.2f}**" in page
    assert "No runs yet: `zskd-nni reproduce main`." in page


def test_the_page_in_docs_is_that_of_the_records() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == render_page(read_records(ROOT / "results" / "reproduce"))


def test_every_committed_record_counts_in_its_row() -> None:
    """Most were made by version 0.1, whose records carried a fingerprint of settings in the place of sizes."""
    records = read_records(ROOT / "results" / "reproduce")
    groups = group_records(records)
    rows = {key: [record["seed"] for record in group] for key, group in groups.items()}
    assert take_out_older(groups) == []
    assert {key: [record["seed"] for record in group] for key, group in groups.items()} == rows
    assert len(records) == sum(map(len, rows.values())) >= 811
    assert sum("sizes" not in record for record in records) >= 811


def test_a_setting_that_a_record_does_not_name_had_its_default() -> None:
    plan = resolve(Cell("mnist", "zskd", "best"), "cpu")
    record = read_record(ROOT / "results" / "reproduce" / "mnist-zskd-best-cpu-seed0.json")

    def altered_setting(part: str, **changes: Any) -> dict[str, Any]:
        changed = copy.deepcopy(record)
        changed["ingredients"][part].update(changes)
        return changed

    assert plan.matches(record)
    assert "batch_statistics" not in record["ingredients"]["synthesis"]  # younger than the record
    assert plan.matches(altered_setting("synthesis", batch_statistics=0.0))
    assert not plan.matches(altered_setting("synthesis", batch_statistics=0.1))
    without = copy.deepcopy(record)
    del without["ingredients"]["student"]["weight_decay"], without["ingredients"]["student"]["augmentation"]["noise"]
    assert plan.matches(without)
    assert not plan.matches(altered_setting("student", weight_decay=0.1))
    assert not plan.matches(altered_setting("student", a_setting_that_is_gone=1))
    del without["ingredients"]["student"]["augmentation"]["rotation"]  # which is not at its default
    assert not plan.matches(without)
    assert not plan.matches({**record, "impressions": record["impressions"] - 1})
    assert not plan.matches({**record, "sizes": {**plan.sizes, "block": 5}})
    assert not plan.matches({**record, "networks": {"student": ["zoo:lenet5", {}]}})


def test_no_record_no_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("as it was")
    code, output = call("results", "--results", tmp_path / "misspelt", "--out", page)
    assert code == 2 and is_one_sentence(output) and "there is no record in" in output
    assert page.read_text() == "as it was"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"networks": None}, "'networks'"),
        ({"provenance": None}, "'provenance'"),
        ({"provenance": {}}, "'provenance'"),
        ({"accuracy": "x"}, "'accuracy'"),
        ({"cell": ["a"]}, "'cell'"),
        ({"seed": "0"}, "'seed'"),
        ({"accuracy": {}}, "'accuracy'"),
        ({"accuracy": {"teacher": 99.0, "student": float("nan")}}, "'accuracy'"),
        ({"accuracy": {"teacher": None, "student": 5.0}}, "'accuracy'"),
        ({"calibration_error": None}, "'calibration_error'"),
        ({"impressions": "many"}, "'impressions'"),
        ({"mte": "x"}, "'mte'"),
        ({"variant": 5}, "'variant'"),
    ],
)
def test_records_that_are_not_whole(digits: Path, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    record = next((digits / "results").glob("*.json"))
    (tmp_path / record.name).write_text(json.dumps({**read_json(record), **changes}))
    code, output = call("results", "--results", tmp_path, "--out", tmp_path / "page.md")
    assert code == 2 and is_one_sentence(output) and word in output and record.name in output


def test_two_records_of_one_run_are_told(digits: Path, tmp_path: Path) -> None:
    record = next((digits / "results").glob("*.json"))
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_bytes(record.read_bytes())
    code, output = call("results", "--results", tmp_path, "--out", tmp_path / "page.md")
    assert code == 2 and is_one_sentence(output) and "a.json" in output and "b.json are records of one run" in output


def test_a_damaged_record_does_not_keep_other_cells_from_being_run(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "all")
    results = tmp_path / "all" / "results"
    names = [f"digits-{method}-smoke-seed0.json" for method in ("none", "noise")]
    (results / names[0]).write_text("{")
    (results / names[1]).unlink()
    cells = ["--cell", "digits-none", "--cell", "digits-noise"]
    code, output = call("reproduce", "digits", *cells, "--scale", "smoke", "--seed", SEED, *at(tmp_path / "all"))
    assert code == 2 and "Remove the file, and run its cell again" in output
    assert (results / names[1]).exists()


def test_a_finished_student_that_was_changed_is_trained_again(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "all")
    record = tmp_path / "all" / "results" / "digits-noise-smoke-seed0.json"
    wanted = read_json(record)["agreement"]
    (home,) = (tmp_path / "all" / "runs" / "students").glob("digits-noise-smoke-seed0-*")
    weights = {name: -value for name, value in load_tensors(home / "student.safetensors")[0].items()}
    save_tensors(home / "student.safetensors", weights)
    record.unlink()
    command = ["reproduce", "digits", "--cell", "digits-noise", "--scale", "smoke", "--seed", SEED]
    code, output = call(*command, *at(tmp_path / "all"))
    assert code == 0, output
    assert read_json(record)["agreement"] == wanted


def test_all_tables_have_each_the_seeds_of_theirs() -> None:
    code, output = call("reproduce", "all", "--cell", "mnist-ats-paper-uniform", "--scale", "cpu", "--list")
    assert code == 0 and "5 seeds" in output
    code, output = call("reproduce", "all", "--cell", "mnist-sts-best", "--list")
    assert code == 0 and "3 seeds" in output


def test_a_record_of_a_scale_that_is_no_more_counts_nowhere(digits: Path, tmp_path: Path) -> None:
    records = read_records(digits / "results")
    assert "tiny" not in render_page([*records, {**records[0], "scale": "tiny"}])


@pytest.mark.parametrize("name", list(TABLES))
def test_no_two_rows_of_a_table_are_one_run(name: str) -> None:
    for pair in dict.fromkeys(cell.pair for cell in TABLES[name].cells):
        for scale in PAIRS[pair].scales:
            plans = [resolve(cell, scale) for cell in TABLES[name].cells if cell.pair == pair]
            prints = [plan.fingerprint("teacher", SEED) for plan in plans]
            twins = [plan.cell.name for plan, mark in zip(plans, prints, strict=True) if prints.count(mark) > 1]
            assert not twins, f"{twins} are the same at the scale {scale}"


def test_seconds_of_killed_processes_are_those_of_their_shards(digits: Path, tmp_path: Path) -> None:
    plan = resolve(Cell("digits", "zskd", "best"), "smoke")
    whole = make_source(plan, PairContext("digits", workspace_in(tmp_path)), SEED)
    clock = next((tmp_path / "runs" / "transfer").rglob("seconds.json"))
    assert whole.seconds > 0
    clock.unlink()  # as a process leaves it that is killed before the end
    again = make_source(plan, PairContext("digits", workspace_in(tmp_path)), SEED)
    assert again.seconds >= ImpressionStore.open(clock.parent / "set").summary()["seconds"] > 0
    clock.write_text("{}")
    with pytest.raises(UserError, match=r"seconds\.json is incomplete"):
        make_source(plan, PairContext("digits", workspace_in(tmp_path)), SEED)


# Names.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mian"], "There is no table 'mian'; did you mean main"),
        (["main", "--cell", "mnist-zkd"], "No cell of the table is called 'mnist-zkd'; did you mean mnist-zskd"),
        (["digits", "--scale", "cpu"], "--scale: digits has no scale 'cpu'; it has full, smoke."),
        (["cifar10-wrn"], "No trained weights 'wrn-40-2-cifar10' come with the package"),
    ],
)
def test_unknown_names_end_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = call("reproduce", *arguments, *at(tmp_path))
    assert code == 2
    assert is_one_sentence(output)
    assert message in output
    assert not (tmp_path / "results").exists()


def test_test_data_are_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZSKD_NNI_DATA", raising=False)
    code, output = call("reproduce", "main", "--cell", "mnist-none", *at(tmp_path))
    assert code == 2
    assert "The data set mnist needs a folder" in output
    assert not (tmp_path / "runs").exists()


def test_the_tables_are_listed() -> None:
    code, output = call("reproduce")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()[: len(TABLES)]] == list(TABLES)


def test_cells_are_chosen_by_name_beginning_or_part() -> None:
    table = find_table("main")
    names = [cell.name for cell in choose_cells(table, ["mnist-zskd-best"])]
    assert names == ["mnist-zskd-best"]  # not fashion-mnist-zskd-best
    assert {cell.pair for cell in choose_cells(table, ["mnist-"])} == {"mnist"}
    assert {cell.pair for cell in choose_cells(table, ["zskt"])} == {"mnist", "fashion-mnist"}
    assert choose_cells(table, []) == list(table.cells)
    everything = find_table("all")
    assert {cell.name for table in TABLES.values() for cell in table.cells} == {cell.name for cell in everything.cells}


# Settings.


def test_a_name_means_one_cell_and_every_cell_has_settings() -> None:
    seen: dict[str, Cell] = {}
    for table in TABLES.values():
        for cell in table.cells:
            assert seen.setdefault(cell.name, cell) == cell
            assert cell.method in METHODS
    for cell in seen.values():
        scale = next(reversed([name for name in PAIRS[cell.pair].scales if name != "smoke"]))
        plan = resolve(cell, scale)
        if cell.method != "none" and (cell.method != "zskt" or cell.preset == "best"):
            published = cell.preset in PUBLISHED_STUDENT and cell.method != "ats"
            steps = plan.scale.published_steps if published else None
            assert plan.ingredients["student"]["steps"] == (steps or plan.scale.steps)
        assert estimate_seconds(plan) > 0


def test_every_scale_of_a_pair_has_settings() -> None:
    for name, pair in PAIRS.items():
        for scale in pair.scales:
            for method, preset in (("zskd", "author-code"), ("zskd", "best"), ("zskt", "paper"), ("sts", "paper")):
                plan = resolve(Cell(name, method, preset), scale)
                if preset == "author-code":
                    assert plan.size is not None
                    assert plan.size % 20 == 0 or name == "digits"


@pytest.mark.parametrize("pair", ["mnist", "fashion-mnist"])
def test_best_is_the_packaged_recipe(pair: str) -> None:
    recipe = load_recipe(f"{pair}-half").recipe
    plan = resolve(Cell(pair, "zskd", "best"), "full")
    assert recipe.student is not None
    assert plan.size == recipe.transfer.size
    assert plan.student == recipe.distillation
    options = recipe.transfer.options()
    assert options.synthesis.batch_statistics > 0  # of no meaning to these teachers
    assert plan.options == replace(options, synthesis=replace(options.synthesis, batch_statistics=0.0))
    assert plan.network == (recipe.student.model, recipe.student.arguments)
    assert recipe.teacher.weights == f"zoo:{PAIRS[pair].teacher}"
    assert PAIRS[pair].recipe.spec == recipe.teacher.input


@pytest.mark.parametrize("pair", ["mnist", "fashion-mnist"])
def test_real_data_rows_have_the_students_recipe_of_the_data_free_ones(pair: str) -> None:
    for preset in ("paper", "best"):
        students = {
            method: resolve(Cell(pair, method, preset), "full").student for method in ("zskd", "sts", "real-kd")
        }
        assert len(set(students.values())) == 1
    labels = resolve(Cell(pair, "real-labels"), "full").student
    assert labels == resolve(Cell(pair, "zskd", "best"), "full").student


@pytest.mark.parametrize("pair", ["cifar10-alexnet", "cifar10-wrn"])
def test_published_students_do_not_depend_on_what_a_processor_is_fast_with(pair: str) -> None:
    student = resolve(Cell(pair, "zskd", "paper"), "full").student
    assert (student.autocast, student.features, student.regressors) == (False, "none", False)


@pytest.mark.parametrize(("pair", "weight"), [("fashion-mnist", 0.0), ("digits", 0.0), ("cifar10-alexnet", 0.1)])
def test_batch_statistics_are_of_teachers_that_have_some(pair: str, weight: float) -> None:
    for method in ("zskd", "sts", "class-impressions"):
        plan = resolve(Cell(pair, method, "best"), "full")
        assert plan.options.synthesis.batch_statistics == weight
        assert plan.ingredients["synthesis"].get("batch_statistics", 0.0) == weight
        assert resolve(Cell(pair, method, "paper"), "full").options.synthesis.batch_statistics == 0.0
    assert (resolve(Cell(pair, "zskt", "best"), "full").options.batch_statistics > 0) == (weight > 0)


def test_balanced_and_unbalanced_differ_in_the_balancing_alone() -> None:
    cells = {cell.name: resolve(cell, "full") for cell in TABLES["ats-balance"].cells}
    for name, balanced in cells.items():
        if balanced.cell.preset != "paper":
            continue
        unbalanced = cells[name.replace("-ats-paper-", "-ats-unbalanced-")]
        one, other = balanced.ingredients, unbalanced.ingredients
        assert {key for key in one if one[key] != other[key]} == {"balanced", "fill"}
        assert balanced.size == unbalanced.size


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_what_was_chosen_for_the_paper_preset_stays_with_lenet(pair: str) -> None:
    own = PAIRS[pair].student
    plan = resolve(Cell(pair, "zskd", "paper"), "full")
    made = plan.ingredients["synthesis"]
    chosen = (plan.student.learning_rate, plan.student.augmentation, made["learning_rate"], made["max_steps"])
    moves: dict[str, dict[str, Any]] = {  # further than those of best
        "mnist": {"rotation": 16, "translation": 0.1, "scale": (0.8, 1.2), "shear": 6},
        "fashion-mnist": {"rotation": 4, "translation": 0.03, "scale": (0.95, 1.05), "shear": 1.5},
    }
    if pair in moves:
        assert chosen == (0.01, replace(own.augmentation, contrast=0.3, **moves[pair]), 0.5, 30)
    elif PAIRS[pair].recipe.network.endswith("lenet5"):
        assert chosen == (0.01, replace(own.augmentation, contrast=0.3), 0.5, 30)
    else:
        plain = {"rotation": 0, "translation": 0.1, "scale": (0.9, 1.1), "border": "zeros", "cutmix": 0.0, "mixup": 0.0}
        assert chosen == (0.002, replace(own.augmentation, **plain), 0.05, 100)
        assert (plan.student.weight_decay, plan.student.regressors, plan.student.autocast) == (0, False, False)
    assert (plan.student.temperature, plan.student.features) == (20, "none")
    assert resolve(Cell(pair, "zskd", "best"), "full").student == replace(own, steps=plan.scale.steps)
    assert plan.student.steps == (48000 if pair == "mnist" else plan.scale.steps)
    published = {"fashion-mnist": 512, "cifar10-alexnet": 128}
    assert plan.student.batch == published.get(pair, own.batch)
    assert ("that of MNIST's" in plan.selected_on) == (pair == "mnist")


def test_each_ingredient_is_alone() -> None:
    cells = {cell.variant: resolve(cell, "full") for cell in TABLES["best-ablation"].cells if cell.pair == "mnist"}
    base, best = cells["base"], cells[""]
    assert base.size == best.size
    assert {plan.size for plan in cells.values()} == {best.size}

    def changed(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        return {
            f"{key}.{inner}"
            for key in one
            for inner in one[key]
            if isinstance(one[key], dict) and one[key][inner] != other[key][inner]
        }

    assert changed(base.ingredients, cells["only-total-variation"].ingredients) == {"synthesis.total_variation"}
    assert changed(base.ingredients, cells["only-augmentation"].ingredients) == {"student.augmentation"}
    assert changed(base.ingredients, cells["only-student-temperature"].ingredients) == {"student.temperature"}
    assert changed(base.ingredients, cells["only-features"].ingredients) == {"student.features"}
    assert changed(best.ingredients, cells["without-features"].ingredients) == {"student.features"}
    rate = {"student.learning_rate"}
    assert changed(base.ingredients, cells["only-student-learning-rate"].ingredients) == rate
    assert changed(best.ingredients, cells["without-student-learning-rate"].ingredients) == rate
    assert changed(best.ingredients, cells["without-held-background"].ingredients) == {"synthesis.hold"}
    assert changed(best.ingredients, cells["without-augmentation"].ingredients) == {"student.augmentation"}
    alone = set().union(*(changed(base.ingredients, p.ingredients) for v, p in cells.items() if v.startswith("only-")))
    assert changed(base.ingredients, best.ingredients) <= alone


@pytest.mark.parametrize("pair", ["fashion-mnist", "cifar10-wrn"])
def test_each_ingredient_of_zskt_is_alone(pair: str) -> None:
    table = TABLES["zskt-ablation"].cells
    plans = {cell.variant: resolve(cell, "full") for cell in table if cell.pair == pair}
    assert not any(plan.zskt_trains_student for plan in plans.values())
    assert len({repr(plan.student) for plan in plans.values()}) == 1

    def apart(one: str, other: str) -> set[str]:
        first, second = asdict(plans[one].options), asdict(plans[other].options)
        return {key for key in first if first[key] != second[key]}

    memory = {"memory", "new_images", "filling", "latents"}
    assert apart("base", "only-classes") == apart("", "without-classes") == {"class_weight"}
    assert apart("base", "only-rhythm") == apart("", "without-rhythm") == {"generator_steps", "student_steps"}
    assert apart("base", "only-memory") == memory
    assert apart("base", "only-memory-and-figures") == apart("", "without-memory") == {*memory, "figures"}
    assert apart("", "without-figures") == {"figures"}
    assert apart("", "without-adversary") == {"adversarial_weight"}
    alone = set().union(*(apart("base", variant) for variant in plans if variant.startswith("only-")))
    taken = set().union(*(apart("", variant) for variant in plans if variant.startswith("without-")))
    assert alone == apart("base", "")
    assert taken == {*alone, "adversarial_weight"}
    assert ("batch_statistics" in alone) == (pair == "cifar10-wrn") == ("divergence" in alone)


def test_a_cell_that_names_the_students_recipe_does_not_play_the_papers_game() -> None:
    game, source = Cell("digits", "zskt", "fresh"), Cell("digits", "zskt", "fresh", "source", student={"steps": 9})
    assert resolve(game, "smoke").zskt_trains_student
    assert "student" not in resolve(game, "smoke").ingredients
    assert not resolve(source, "smoke").zskt_trains_student
    assert resolve(source, "smoke").ingredients["student"]["steps"] == 9


def test_published_numbers_and_targets_are_of_rows() -> None:
    rows = {(cell.pair, cell.method, cell.preset) for table in TABLES.values() for cell in table.cells}
    presets = {preset for _, _, preset in rows}
    for key in TARGETS:
        assert key in rows or (key[1] == "zskt" and key[2] in presets)
    for pair, method, network in PUBLISHED:
        assert method.startswith("kd-at-") or any((pair, method) == row[:2] for row in rows)
        assert not network or network in PAIRS[pair].students


# Transfer sets.


def images_of(plan: Any, context: PairContext) -> torch.Tensor:
    source = make_source(plan, context, 1).source
    assert isinstance(source, StoredSource)
    return source.images[:]


def test_a_smaller_set_is_the_beginning_of_the_larger_one(tmp_path: Path) -> None:
    context = PairContext("digits", workspace_in(tmp_path))
    small = images_of(resolve(Cell("digits", "zskd", "best", size=25), "smoke"), context)
    stores = sorted((tmp_path / "runs").rglob("shard-*.safetensors"))
    before = [(path, path.stat().st_mtime_ns) for path in stores]
    assert len(stores) == 2
    large = images_of(
        resolve(Cell("digits", "zskd", "best", "not-augmented", student={"augmentation": Augmentation()}), "smoke"),
        context,
    )
    assert (len(small), len(large)) == (25, 40)
    assert torch.equal(small, large[:25])
    assert [(path, path.stat().st_mtime_ns) for path in stores] == before  # shared, not made again
    assert sorted((tmp_path / "runs").rglob("shard-*.safetensors")) == stores
    assert not torch.equal(large[:20], large[20:])
    other = make_source(resolve(Cell("digits", "zskd", "best"), "smoke"), context, 2).source
    assert not torch.equal(other.images[:], large)  # type: ignore[union-attr]


def test_a_set_that_is_being_made_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = PairContext("digits", workspace_in(tmp_path))
    plan = resolve(Cell("digits", "zskd", "paper"), "smoke")
    expected = images_of(plan, context)
    home = next((tmp_path / "runs" / "transfer").iterdir()) / "block-000"
    lock = only_writer(home)
    lock.__enter__()
    monkeypatch.setattr(sources.time, "sleep", lambda _: lock.__exit__(None, None, None))
    assert torch.equal(images_of(plan, context), expected)


def constant_teacher() -> Teacher:
    """A network that puts everything into class 3."""
    network = lenet5()
    with torch.no_grad():
        network.fc3.bias.copy_(torch.tensor([0.0] * 3 + [1e4] + [0.0] * 6))
    return Teacher(network, InputSpec((1, 32, 32)))


def test_a_teacher_that_cannot_balance_leaves_the_counts(tmp_path: Path) -> None:
    context = PairContext("digits", workspace_in(tmp_path))
    context.teacher = constant_teacher()
    cell = Cell("digits", "ats", "paper", "uniform", options={"sources": ("noise-uniform",)})
    record = CellRun(resolve(cell, "smoke"), context, SEED).run()
    assert record is not None
    assert record["accuracy"]["student"] is None
    assert "the teacher puts all" in record["outcome"]
    counts = record["transfer"]["counts"]["candidates"]
    assert counts[3] > 0
    assert sum(counts) == counts[3]
    assert set(NEEDED) <= set(read_record(tmp_path / "results" / "digits-ats-paper-uniform-smoke-seed0.json"))


# Stops and failures.


def test_stopped_and_resumed_bit_by_bit(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in synthesis, in training and while it is measured, a run ends as one that never stopped."""
    calls = 0

    def asked() -> int:
        nonlocal calls
        calls += 1
        return 15 if calls in (7, 20, 30) else 0

    def check() -> None:
        if asked():
            raise signals.Interrupted(15)

    monkeypatch.setattr(signals, "asked", asked)
    monkeypatch.setattr(signals, "check", check)
    stops = 0
    while True:
        try:
            run_table(
                Selection("digits", ["digits-zskd-best"], [SEED], "smoke"), workspace_in(tmp_path), lambda _: None
            )
            break
        except signals.Interrupted:
            stops += 1
    assert stops == 3
    name = "digits-zskd-best-smoke-seed0"
    ours, theirs = (read_json(folder / "results" / f"{name}.json") for folder in (tmp_path, digits))
    for key in ("accuracy", "agreement", "mte", "calibration_error", "ingredients", "sizes", "history"):
        assert ours[key] == theirs[key]
    weights = [next((f / "runs" / "students").glob(f"{name}-*")) / "student.safetensors" for f in (tmp_path, digits)]
    assert sha256_of_file(weights[0]) == sha256_of_file(weights[1])


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    context, plan = PairContext("digits", workspace_in(tmp_path)), resolve(Cell("digits", "none"), "smoke")
    assert CellRun(plan, context, SEED).run() is not None
    record = next((tmp_path / "results").iterdir())
    record.unlink()
    said: list[str] = []
    with only_writer(next((tmp_path / "runs" / "students").iterdir())):
        run_table(Selection("digits", ["digits-none"], [SEED], "smoke"), workspace_in(tmp_path), said.append)
    assert "1 runs were skipped: another process is running them" in said
    assert not record.exists()


def test_a_cell_that_fails_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = (
        Cell("digits", "noise", variant="too-fast", student={"learning_rate": 1e30, "warmup": 0}),
        Cell("digits", "zskt", "paper", "too-fast", options={"student_learning_rate": 1e30}),
        Cell("digits", "zskt", "paper", "wrong-layers", options={"attention": (("conv1", "conv2"),)}),
        Cell("digits", "kd-at", variant="wrong-layers", shots=2, options={"attention": (("conv1", "pool1"),)}),
        Cell("digits", "kd-at", variant="too-many", shots=5000),
        Cell("digits", "none"),
    )
    monkeypatch.setitem(TABLES, "digits", Table("Failures", "", cells))
    said: list[str] = []
    with pytest.raises(UserError, match=r"digits-noise-too-fast-smoke seed 0 failed: .*diverged.* 4 more failed\.$"):
        run_table(Selection("digits", [], [SEED], "smoke"), workspace_in(tmp_path), said.append)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["digits-none-smoke-seed0.json"]
    assert "ZSKT diverged" in said[1] or "generator diverged" in said[1]
    assert "step" in said[1]
    assert "Attention cannot be compared between the teacher's 'conv1' (28 x 28) and the student's 'conv2'" in said[2]
    assert "Attention cannot be compared between the teacher's 'conv1' (28 x 28) and the student's 'pool1'" in said[3]
    assert "digits has 145 images of class 0, not 5000" in said[4] or "images of class 0, not 5000" in said[4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no record of zskd-nni reproduce"),
        ("{", "cannot be read as JSON"),
        (json.dumps({"format": "zskd_nni reproduction 1", "cell": "a"}), "it lacks 'pair'"),
    ],
)
def test_damaged_records_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    code, output = call("results", "--results", tmp_path, "--out", tmp_path / "page.md")
    assert (code, is_one_sentence(output)) == (2, True)
    assert message in output
    assert "bad.json" in output
    assert not (tmp_path / "page.md").exists()


# The page.


def altered(
    record: dict[str, Any],
    cell: Cell,
    seed: int,
    student: float | None,
    teacher: float = 99.34,
    scale: str = "full",
) -> dict[str, Any]:
    """A real record under another name, with another accuracy."""
    changed = copy.deepcopy(record)
    names = {"cell": cell.name, "pair": cell.pair, "method": cell.method, "preset": cell.preset or None}
    changed.update(names, variant=cell.variant or None, seed=seed, scale=scale)
    changed["accuracy"] = {"teacher": teacher, "student": student}
    plan = resolve(cell, scale)
    changed.update(ingredients=plan.ingredients, sizes=plan.sizes, networks={"student": list(plan.network)})
    return changed


@pytest.fixture
def a_record(digits: Path) -> dict[str, Any]:
    return read_record(digits / "results" / "digits-zskd-best-smoke-seed0.json")


def line_of(page: str, start: str) -> str:
    (line,) = {line for line in page.splitlines() if line.startswith(start)}
    return line


def test_means_targets_and_published_numbers(a_record: dict[str, Any]) -> None:
    best, real = Cell("mnist", "zskd", "best"), Cell("mnist", "real-kd", "best")
    records = [altered(a_record, best, seed, value) for seed, value in ((0, 98.8), (2, 99.0), (1, 99.1))]
    without = line_of(render_page(records), "| zskd | best | - |")
    assert f"**{statistics.mean([98.8, 99.0, 99.1]):.2f} ± {statistics.stdev([98.8, 99.0, 99.1]):.2f}**" in without
    assert "| 0, 1, 2 |" in without
    assert "| 98.77 (teacher 99.34) |" in without
    assert "Published: zskd: ZSKD, ICML 2019" in render_page(records)
    assert "98.90: met; (real KD - 0.2): not run" in without
    records += [altered(a_record, real, 0, 99.3)]
    page = render_page(records)
    assert "98.90: met; 99.10 (real KD - 0.2): missed by 0.13" in line_of(page, "| zskd | best | - |")
    assert "98.95 (teacher - 0.39): met" in line_of(page, "| real-kd | best | - |")
    assert "2 of 18 cells, 4 of 54 runs." in page
    smaller = line_of(render_page([altered(a_record, best, 0, 98.8, scale="cpu")]), "| zskd | best | - |")
    assert "98.90" not in smaller, "targets are those of full size"
    assert mean_and_deviation([]) == "-"


def balance_cell(preset: str, variant: str) -> Cell:
    (cell,) = choose_cells(TABLES["ats-balance"], [f"mnist-ats-{preset}-{variant}"])
    return cell


def test_balanced_beside_unbalanced_by_seed(a_record: dict[str, Any]) -> None:
    values = {"paper": {0: 80.0, 1: 82.0, 2: 81.0, 3: None}, "unbalanced": {0: 70.0, 1: 73.0, 2: 70.0, 3: 60.0, 4: 1.0}}
    records = []
    for preset, by_seed in values.items():
        for seed, value in by_seed.items():
            record = altered(a_record, balance_cell(preset, "uniform"), seed, value)
            record["transfer"] = {"counts": {"candidates": [9], "own": [3, 4], "repeats": [1, 0], "nearest": [0, 0]}}
            records.append(record)
    differences = [10.0, 9.0, 11.0]
    expected = f"| {statistics.mean(differences):.2f} ± {statistics.stdev(differences):.2f} | yes | 7 / 1 / 0 |"
    row = line_of(render_page(records), "| noise-uniform |")
    assert expected in row
    assert row.endswith("| 0, 1, 2, 3, 4 |")


def test_records_of_cells_that_are_gone_are_named(a_record: dict[str, Any]) -> None:
    gone = {**altered(a_record, Cell("mnist", "zskd", "best"), 0, 1.0), "cell": "mnist-zskd-old"}
    assert "`mnist-zskd-old`" in render_page([gone])


def test_nothing_is_scored_on_test_data_before_the_student_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, order = workspace_in(tmp_path), []

    def scored(*arguments: Any, **options: Any) -> Any:
        order.append(bool(list(place.runs.rglob("student.safetensors"))))
        return original(*arguments, **options)

    original = running.logits_on
    for module in (running, contexts):
        monkeypatch.setattr(module, "logits_on", scored)
    record = CellRun(resolve(Cell("digits", "noise"), "smoke"), PairContext("digits", place), SEED).run()
    assert record is not None and record["accuracy"]["teacher"] == pytest.approx(98.89, abs=0.01)
    assert order == [True, True]  # the student, the teacher


def test_counts_of_a_source_that_only_some_seeds_balance(a_record: dict[str, Any]) -> None:
    records = []
    for seed, value in ((0, 80.0), (1, None)):
        record = altered(a_record, balance_cell("paper", "uniform"), seed, value)
        made = {"own": [3, 4], "repeats": [1, 0], "nearest": [0, 0]} if value else {}
        record["transfer"] = {"counts": {"candidates": [9], **made}}
        records.append(record)
    for given in (records, records[::-1]):
        assert "7 / 1 / 0 (of 2 seeds 1 could be balanced)" in line_of(render_page(given), "| noise-uniform |")


def test_records_of_older_settings_do_not_count_beside_newer_ones(a_record: dict[str, Any]) -> None:
    cell = Cell("mnist", "zskd", "best")
    records = [altered(a_record, cell, seed, 90.0 + seed) for seed in (0, 1, 2)]
    older = Cell("mnist", "zskd", "best", student={"steps": 11})
    records[2]["ingredients"] = altered(a_record, older, 2, 0.0)["ingredients"]
    page = render_page(records)
    assert f"**{statistics.mean([90.0, 91.0]):.2f}" in line_of(page, "| zskd | best | - |")
    assert "`mnist-zskd-best (full) seed 2`" in page


def test_a_cell_whose_records_are_all_older_has_no_row(a_record: dict[str, Any]) -> None:
    cell = Cell("mnist", "zskd", "best")
    records = [altered(a_record, cell, seed, 90.0 + seed) for seed in (0, 1)]
    for record, steps in zip(records, (11, 12), strict=True):
        changed = Cell("mnist", "zskd", "best", student={"steps": steps})
        record["ingredients"] = altered(a_record, changed, record["seed"], 0.0)["ingredients"]
    page = render_page(records)
    assert "| zskd | best |" not in page
    assert "`mnist-zskd-best (full) seed 0`, `mnist-zskd-best (full) seed 1`" in page


def test_records_of_another_teacher_do_not_count(a_record: dict[str, Any]) -> None:
    records = [altered(a_record, Cell("mnist", "zskd", "best"), seed, 90.0 + seed) for seed in (0, 1)]
    other = copy.deepcopy(a_record)
    other["provenance"]["teacher"] = "0" * 64
    records.append(altered(other, Cell("mnist", "zskd", "best"), 2, 50.0))
    records.append(altered(other, Cell("mnist", "sts", "best"), 0, 50.0))
    page = render_page([*records, altered(a_record, Cell("mnist", "zskd", "paper"), 0, 80.0)])
    assert f"**{statistics.mean([90.0, 91.0]):.2f}" in line_of(page, "| zskd | best | - |")
    assert "`mnist-zskd-best (full) seed 2`" in page
    assert "`mnist-sts-best (full) seed 0`" in page
    retrained = render_page(records, {"mnist": "0" * 64})  # the teacher that is there now has fewer records
    assert "**50.00**" in line_of(retrained, "| zskd | best | - |")
    assert "`mnist-zskd-best (full) seed 0`, `mnist-zskd-best (full) seed 1`" in retrained


def test_the_number_of_images_is_of_a_seed_that_has_some(a_record: dict[str, Any]) -> None:
    cell = Cell("mnist", "ats", "paper")
    records = [altered(a_record, cell, seed, value) for seed, value in ((0, None), (1, 80.0))]
    records[0]["impressions"] = None
    assert f"| {records[1]['impressions']:,} |" in line_of(render_page(records), "| ats | paper |")


def test_a_mean_says_which_seeds_have_no_student(a_record: dict[str, Any]) -> None:
    cell = Cell("mnist", "ats", "paper")
    records = [altered(a_record, cell, seed, value) for seed, value in ((0, 80.0), (1, None), (2, 82.0))]
    row = line_of(render_page(records), "| ats | paper |")
    assert "**81.00 ± 1.41**" in row
    assert "| 0, (1), 2 |" in row


def test_a_transition_error_that_is_asked_for_later_is_measured(tmp_path: Path) -> None:
    context = PairContext("digits", workspace_in(tmp_path))
    plan = resolve(Cell("digits", "noise"), "smoke")
    assert CellRun(plan, context, SEED).run() is not None
    with_error = resolve(Cell("digits", "noise", transition=True), "smoke")
    assert [CellRun(one, context, SEED).status() for one in (plan, with_error)] == ["finished", "begun"]
    record = CellRun(with_error, context, SEED).run()
    assert record is not None
    assert record["mte_asked"] == {"images": 3, "steps": 5}
    assert [CellRun(one, context, SEED).status() for one in (plan, with_error)] == ["finished", "finished"]
    longer = replace(with_error, scale=replace(with_error.scale, mte_steps=6))
    assert CellRun(longer, context, SEED).status() == "begun"


def test_what_was_begun_on_another_device_is_not_gone_on_with(tmp_path: Path) -> None:
    place, plan = workspace_in(tmp_path), resolve(Cell("digits", "noise"), "smoke")
    on_cpu, elsewhere = (
        CellRun(plan, PairContext("digits", replace(place, device=device)), 0) for device in ("cpu", "cuda:0")
    )
    elsewhere.context.teacher = on_cpu.context.teacher  # there is no such device here
    assert elsewhere.folder == on_cpu.folder.with_name(f"{on_cpu.folder.name}-cuda")


def test_all_tables_at_a_scale_that_some_pairs_lack(tmp_path: Path) -> None:
    code, output = call("reproduce", "all", "--scale", "cpu", "--list", *at(tmp_path))
    assert code == 0 and "mnist-zskd-best-cpu" in output and "digits-" not in output
    code, output = call("reproduce", "digits", "--scale", "cpu", "--list", *at(tmp_path))
    assert code == 2 and "digits has no scale 'cpu'" in output


def test_selected_on_is_of_the_method_or_else_of_the_preset() -> None:
    def told(*cell: str) -> str:
        return resolve(Cell(*cell), "full").selected_on

    assert told("fashion-mnist", "zskd", "best") == "the last 5,000 images of Fashion-MNIST's training split"
    assert "measured on MNIST's test split" in told("mnist", "zskd", "best")
    assert told("mnist", "zskt", "paper").startswith("the settings of the paper and its released code; width")
    assert "our reading" in told("mnist", "ats", "paper")
    assert told("cifar10-alexnet", "zskd", "best").startswith("the last 5,000 training images of CIFAR-10")
