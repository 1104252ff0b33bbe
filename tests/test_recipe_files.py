"""Recipes: every mistake is one sentence that names the key and what would be right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import digits_network, small_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.recipes.load import LoadedRecipe, load_recipe, packaged_names, recipe_text
from zskd_nni.recipes.named_files import named_files
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import save_tensors
from zskd_nni.runtime.validation import build_settings
from zskd_nni.synthesis import SynthesisSettings
from zskd_nni.training.distillation import DistillationSettings

DIGITS = "digits-prune50"


def plain(name: str = DIGITS) -> dict[str, Any]:
    return yaml.safe_load(recipe_text(name)[0])


def write(folder: Path, content: object) -> str:
    path = folder / "recipe.yml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


# Packaged recipes.


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_recipes_are_sound(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    assert loaded.recipe.description
    assert loaded.base is None
    again = load_recipe(name, seed=5)
    assert again.recipe.seed == 5
    assert again.recipe.model_copy(update={"seed": loaded.recipe.seed}) == loaded.recipe


def test_the_digits_recipe_brings_its_teacher() -> None:
    teacher = load_recipe(DIGITS).teacher()
    assert (teacher.classifier_path, teacher.num_classes) == ("fc3", 10)
    assert torch.equal(teacher.class_weights(), digits_network().fc3.weight)


# Unknown keys.


@pytest.mark.parametrize(
    ("override", "wrong", "near"),
    [
        ("distilation.steps=3", "distilation", "distillation"),
        ("sed=3", "sed", "seed"),
        ("teacher.imput=3", "teacher.imput", "input"),
        ("teacher.weihgts=x", "teacher.weihgts", "weights"),
        ("teacher.input.shap=3", "teacher.input.shap", "shape"),
        ("distillation.step=3", "distillation.step", "steps"),
        ("distillation.augmentation.rotatoin=3", "distillation.augmentation.rotatoin", "rotation"),
        ("compression.prunning=3", "compression.prunning", "pruning"),
        ("compression.pruning.step=3", "compression.pruning.step", "steps"),
        ("evaluation.dat=x", "evaluation.dat", "data"),
        ("transfer.synthesis.max_step=3", "synthesis.max_step", "max_steps"),
        ("transfer.targets.beta=3", "targets.beta", "betas"),
    ],
)
def test_unknown_keys_name_the_nearest(override: str, wrong: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(DIGITS, [override])
    text = str(caught.value)
    assert DIGITS in text
    assert f"unknown key {wrong!r}; did you mean {near!r}?" in text
    assert "\n" not in text


def test_unknown_keys_of_the_transfer_section_name_its_own_keys() -> None:
    with pytest.raises(UserError, match=r"unknown key.*'presett'"):
        load_recipe(DIGITS, ["transfer.presett=best"])


def test_a_misspelt_preset_names_preset() -> None:
    with pytest.raises(UserError, match="did you mean 'preset'"):
        load_recipe(DIGITS, ["transfer.presett=best"])


def test_keys_like_nothing_list_what_is_known() -> None:
    with pytest.raises(UserError, match=r"'evaluation.zzzzz'; known here: data, split"):
        load_recipe(DIGITS, ["evaluation.zzzzz=1"])


# Types and ranges.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=5", "name: input should be a valid string, not 5"),
        ("teacher=null", "teacher: input should be"),
        ("teacher.input=3", "teacher.input: input should be"),
        ("teacher.input.shape=[1, 32]", "teacher.input.shape"),
        ("teacher.input.shape=[0, 32, 32]", "teacher.input: .*at least 1"),
        ("teacher.input.std=[0]", "teacher.input: std must be positive"),
        ("teacher.model=lenet5", "teacher.model: a network is named as"),
        ("transfer=3", "transfer: input should be"),
        ("transfer.size=0", "transfer.size: .*greater than or equal to 1, not 0"),
        ("transfer.size=many", "transfer.size: .*'many'"),
        ("transfer.held_out=-1", "transfer.held_out"),
        ("transfer.method=zsdk", "no method 'zsdk'.*Did you mean 'zskd'"),
        ("transfer.preset=bset", "preset: zskd has paper, author-code, best, best-colour, not 'bset'"),
        ("transfer.synthesis=3", "transfer: synthesis: input should be"),
        ("transfer.synthesis.temperature=0", "transfer: synthesis: temperature must be positive"),
        ("transfer.synthesis.temperature=1.0e+300", "temperature must be positive .from 1e-06 to 1e.06"),
        ("transfer.synthesis.max_steps=99999999999999999999", "max_steps must be at least 1 and at most 10,000,000"),
        ("transfer.targets.floor=1.0e-320", "floor must be positive .at least 1e-30"),
        ("transfer={method: ats, candidates: 99999999999999}", "candidates must be at least 1 and at most 10,000"),
        ("teacher.input={shape: [1, 32, 32], low: 0, high: 65535}", "teacher.input: .*half precision.*other units"),
        ("teacher.input={shape: [1, 32, 32], low: 1000, high: 1001}", "teacher.input: .*half precision"),
        ("teacher.input={shape: [1, 32, 32], low: 0, high: 1.0e-9}", "teacher.input: .*half precision"),
        ("teacher.input={shape: [1, 32, 32], low: 1.0e+300, high: 1.0e+301}", "teacher.input: .*half precision"),
        ("transfer.synthesis.tolerance=.nan", "transfer: synthesis: tolerance must be positive"),
        ("transfer.targets.betas=[1, -1]", "transfer: targets: beta must be positive"),
        ("distillation=3", "distillation: input should be"),
        ("distillation.steps=abc", "distillation.steps: .*'abc'"),
        ("distillation.steps=1.5", "distillation.steps: .*1.5"),
        ("distillation.temperature=-1", "distillation: temperature must be positive, not -1"),
        ("distillation.augmentation.flip=2", "distillation.augmentation: flip must lie in"),
        ("compression.pruning.config_list=[]", "compression.pruning.config_list"),
        ("compression.pruning.config_list.0.sparse_ratio=1", r"0\.sparse_ratio: a sparsity lies in \[0, 1\), not 1"),
        ("compression.pruning.config_list.0.sparse_ratio=x", r"a sparsity lies in \[0, 1\), not 'x'"),
        ("compression.pruning.schedule={name: AGPPruner, interval: 50, total_times: 9}", r"steps \(200\).*\(450\)"),
        ("compression.pruning.schedule={name: Other, interval: 5, total_times: 9}", "schedule.name: .*AGPPruner"),
        ("compression={}", "needs a student, or compression.pruning"),
        ("evaluation.split=val", "evaluation.split: .*'val'"),
        ("controls=[nose]", "controls.0: .*'nose'"),
        ("seed=-1", "seed: .*greater than or equal to 0, not -1"),
    ],
)
def test_wrong_values_name_the_key_and_the_value(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(DIGITS, [override])
    assert "\n" not in str(caught.value)


def test_nan_is_no_weight_decay() -> None:
    with pytest.raises(UserError, match="weight_decay"):
        load_recipe(DIGITS, ["distillation.weight_decay=.nan"])


# Overrides.


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", True),
        ("transfer.size", True),
        ("transfer.synthesis.max_steps", True),
        ("teacher.input.shape.1", True),
        ("teacher.input.mean", [False]),
        ("distillation.temperature", False),
        ("compression.pruning.steps", True),
    ],
)
def test_true_is_no_number(tmp_path: Path, key: str, value: object) -> None:
    content = plain()
    *above, last = key.split(".")
    place: Any = content
    for part in above:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[int(last) if isinstance(place, list) else last] = value
    said = "true" if value is True else "false"
    with pytest.raises(UserError, match=f"{last}.*: a number belongs here, not {said}"):
        load_recipe(write(tmp_path, content))


def test_true_stays_a_boolean_and_numbers_stay(tmp_path: Path) -> None:
    content = plain()
    content["compression"]["pruning"]["speedup"] = False
    content["distillation"]["temperature"] = 3
    recipe = load_recipe(write(tmp_path, content)).recipe
    assert recipe.compression.pruning is not None and recipe.compression.pruning.speedup is False
    assert recipe.distillation.temperature == 3


def test_overrides_reach_every_depth() -> None:
    changes = [
        "seed=7",
        "transfer.synthesis.max_steps=11",
        "transfer.targets.betas=[0.5]",
        "distillation.augmentation.scale=[0.5, 2]",
        "compression.pruning.config_list.0.sparse_ratio=0.25",
        "compression.pruning.config_list.0.op_names=[conv1]",
        "student.model=zoo:lenet5_half",
        "evaluation=null",
    ]
    recipe = load_recipe(DIGITS, changes).recipe
    assert recipe.seed == 7
    assert recipe.transfer.options().synthesis.max_steps == 11
    assert recipe.transfer.options().targets.betas == (0.5,)
    assert recipe.distillation.augmentation.scale == (0.5, 2.0)
    assert recipe.compression.pruning is not None
    assert recipe.compression.pruning.config_list == [{"op_names": ["conv1"], "sparse_ratio": 0.25}]
    assert recipe.student is not None
    assert recipe.student.model == "zoo:lenet5_half"
    assert recipe.evaluation is None
    assert load_recipe(DIGITS, ["seed=1", "seed=2"], seed=3).recipe.seed == 3
    assert load_recipe(DIGITS).recipe.seed == 0, "nothing sticks"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "key.path=value, not 'seed'"),
        ("=3", "key.path=value"),
        ("a..b=3", "key.path=value"),
        ("seed=[1", "seed: the value is not YAML"),
        ("seed.deep=3", "seed.deep|seed: "),
        ("name.deep=3", "name is .*no keys"),
        ("compression.pruning.config_list.5.x=1", "list of 1; '5' is no index"),
        ("compression.pruning.config_list.x=1", "'x' is no index"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(DIGITS, [override])


def test_a_preset_belongs_to_its_method(tmp_path: Path) -> None:
    def transfer(*changes: str, **options: Any) -> Any:
        return load_recipe(DIGITS, changes, **options).recipe.transfer

    assert plain()["transfer"]["preset"] == "best"
    assert transfer("transfer.method=ats").preset == "paper"
    assert transfer("transfer.preset=unbalanced", "transfer.method=ats").preset == "unbalanced"
    assert transfer("transfer={method: zskd, preset: paper}").preset == "paper"
    assert transfer("transfer.preset=paper", "transfer.method=zskd").preset == "paper"
    content = plain()
    content["transfer"]["preset"] = "paper"
    content["scales"] = {"other": {"transfer.method": "ats"}, "same": {"transfer.method": "zskd"}}
    name = write(tmp_path, content)
    assert load_recipe(name, scale="other").recipe.transfer.preset == "paper", "the default of ats"
    assert load_recipe(name, ["transfer.method=sts"]).recipe.transfer.preset == "best"
    assert load_recipe(name, ["transfer.method=sts"], scale="other").recipe.transfer.preset == "best"
    assert load_recipe(name, scale="same").recipe.transfer.preset == "paper"
    del content["transfer"]["method"]  # zskd where absent
    assert load_recipe(write(tmp_path, content), ["transfer.method=zskd"]).recipe.transfer.preset == "paper"
    assert load_recipe(write(tmp_path, content), ["transfer.method=sts"]).recipe.transfer.preset == "best"


def test_the_last_of_equal_overrides_counts_in_its_place() -> None:
    changes = ["transfer.size=5", "transfer={method: zskd}", "transfer.size=7", "transfer={method: sts}"]
    recipe = load_recipe(DIGITS, changes).recipe
    assert (recipe.transfer.method, recipe.transfer.size) == ("sts", 12000)


def test_strange_digits_are_no_index() -> None:
    with pytest.raises(UserError, match="no index"):
        load_recipe(DIGITS, ["compression.pruning.config_list.²=1"])


# Files.


def test_unknown_recipes_name_a_near_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"did you mean {DIGITS}"):
        load_recipe("digits-prune5")
    with pytest.raises(UserError, match=r"packaged ones: .*or name a \.yml file"):
        load_recipe("zzz")
    with pytest.raises(UserError, match="There is no recipe file"):
        load_recipe(str(tmp_path / "absent.yml"))
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "text", "a: [1", "a: b: c", "\tx: 1", "a: &x 1\nb: *y", "a: !!python/name:os.system ''"]
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"is not YAML|must be a mapping") as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"name: !!python/object/apply:os.mkdir ['{canary}']\n"
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(write(tmp_path, text))
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(DIGITS, [f"name=!!python/object/apply:os.mkdir ['{canary}']"])
    assert not canary.exists()


def test_binary_files_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"recipe\.yml"):
        load_recipe(str(tmp_path / "recipe.yml"))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2001-99-99\n",
        "seed: !!int 'x'\n",
        "seed: !!int ''\n",
        "seed: !!float 'x'\n",
        pytest.param("seed: " + "[" * 3000, id="deep"),
    ],
)
def test_what_yaml_chokes_on(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"recipe\.yml"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("text", ["seed: 1\nname: x\nseed: 2\n", "transfer: {size: 20, size: 30}\n"])
def test_a_key_stands_in_a_mapping_once(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"recipe\.yml.*the key '(seed|size)' occurs twice in one mapping"):
        load_recipe(write(tmp_path, text))


def test_merged_keys_are_no_second_ones() -> None:
    assert load_recipe(DIGITS, ["distillation={<<: {steps: 7}, steps: 8}"]).recipe.distillation.steps == 8


def test_ranges_that_halves_can_hold() -> None:
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-3.0, 3.0), (0.0, 60000.0), (0.0, 1e-4)):
        values = torch.linspace(low, high, 257).half()
        assert InputSpec((1, 2, 2), low, high) and len(values.unique()) == 257


def test_relative_paths_are_meant_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "net.py").write_text("from helpers import small_network\n")
    save_tensors(folder / "w.safetensors", small_network(5).state_dict())
    content = plain()
    content["teacher"] = {"model": "net.py:small_network", "weights": "w.safetensors", "input": {"shape": [1, 8, 8]}}
    content["evaluation"] = {"data": "data.npz"}
    name = write(folder, content)
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(name)
    assert torch.equal(loaded.teacher().class_weights(), small_network(5).head.weight)
    assert loaded.data_name() == str(folder / "data.npz")
    assert load_recipe(name, ["evaluation.data=digits"]).data_name() == "digits"
    assert load_recipe(name, ["evaluation=null"]).data_name() is None


def test_paths_of_overrides_are_those_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key that may name a file; the recipe lies in another folder."""
    for folder in ("recipes", "shell"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text("from helpers import small_network\n")
        for name in ("w.safetensors", "a.npz", "b.npz"):
            (tmp_path / folder / name).write_text(folder)
    content = {**plain(), "transfer": {"method": "ats", "sources": ["a.npz", "b.npz"], "size": 40, "held_out": 20}}
    content["evaluation"] = {"data": "a.npz"}
    name = write(tmp_path / "recipes", content)
    monkeypatch.chdir(tmp_path / "shell")

    def files(*changes: str) -> dict[str, str]:
        loaded = load_recipe(name, changes)
        return {named.key_path: str(named.path(loaded.base).resolve()) for named in named_files(loaded.source)}

    recipes, shell = str(tmp_path / "recipes"), str(tmp_path / "shell")
    own = files()
    assert set(own.values()) == {f"{recipes}/a.npz", f"{recipes}/b.npz"}
    assert files("evaluation.data=a.npz") == {**own, "evaluation.data": f"{shell}/a.npz"}
    assert files("evaluation={data: ./a.npz}") == {**own, "evaluation.data": f"{shell}/a.npz"}
    assert files(f"evaluation.data={recipes}/a.npz") == own, "absolute ones stay"
    assert files("transfer.sources.1=b.npz") == {**own, "transfer.sources.1": f"{shell}/b.npz"}
    assert files("transfer.sources=[shapes, b.npz]")["transfer.sources.1"] == f"{shell}/b.npz"
    assert files("transfer={method: real, data: b.npz}")["transfer.data"] == f"{shell}/b.npz"
    networks = files("teacher.model=net.py:small_network", "student={model: 'net.py:x', weights: w.safetensors}")
    assert networks["teacher.model"] == networks["student.model"] == f"{shell}/net.py"
    assert networks["student.weights"] == f"{shell}/w.safetensors"
    model = load_recipe(name, ["teacher.model=net.py:small_network"]).recipe.teacher.model
    assert model == "../shell/net.py:small_network", "the same from wherever the project lies"
    assert load_recipe(name, ["evaluation.data=digits", "transfer.sources=[shapes]"]).data_name() == "digits"

    (tmp_path / "shell" / "a.npz").unlink()
    with pytest.raises(UserError, match=r"--set evaluation\.data: paths on a command line are relative to the current"):
        load_recipe(name, ["evaluation.data=a.npz"])
    assert load_recipe(name, ["distillation.steps=3"]).data_name() == f"{recipes}/a.npz"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.weights=zoo:nothing", "[Nn]o trained weights 'nothing'.*lenet5-digits"),
        ("teacher.weights=absent.safetensors", "^teacher.weights: There is no weights file"),
        ("teacher.model=zoo:lenet5_half", r"^teacher\.weights: .*zoo:lenet5-digits do not fit.*conv1\.weight"),
        ("teacher.model=zoo:nothing", "no network 'nothing'"),
        ("teacher.classifier=fc9", "'fc9'.*fc1, fc2, fc3"),
        ("teacher.input.shape=[3, 32, 32]", r"teacher\.input\.shape"),
    ],
)
def test_teachers_that_cannot_be_had(override: str, message: str) -> None:
    loaded = load_recipe(DIGITS, [override])
    with pytest.raises(UserError, match=message):
        loaded.teacher()


def test_a_teacher_too_large_to_ship_is_found_where_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(DIGITS, ["teacher.weights=zoo:mine"])
    with pytest.raises(UserError, match="train-teacher NAME --out teachers, and looked for there"):
        loaded.teacher()
    (tmp_path / "teachers").mkdir()
    save_tensors(tmp_path / "teachers" / "mine.safetensors", load_recipe(DIGITS).teacher().model.state_dict())
    assert loaded.teacher().fingerprint == load_recipe(DIGITS).teacher().fingerprint
    with pytest.raises(UserError, match="No trained weights"):
        load_recipe(DIGITS, ["teacher.weights=zoo:../teachers/mine"]).teacher()


# Scales.


@pytest.mark.parametrize("name", packaged_names())
def test_the_scales_of_packaged_recipes_are_recipes(name: str) -> None:
    full = load_recipe(name)
    for scale in full.recipe.scales:
        smaller = load_recipe(name, scale=scale).recipe
        assert smaller.scale == scale
        assert smaller.transfer.size < full.recipe.transfer.size
    assert full.recipe.scale == "full"
    assert load_recipe(name, scale="full").recipe == full.recipe


def test_a_scale_is_chosen_by_its_option_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--set scale: a scale is chosen by --scale"):
        load_recipe(DIGITS, ["scale=cpu"])
    content = {**plain(), "scale": "cpu", "scales": {"cpu": {"transfer.size": 10}}}
    with pytest.raises(UserError, match=r"nothing of scales\.cpu is applied; .* --scale cpu"):
        load_recipe(write(tmp_path, content))
    with pytest.raises(UserError, match="there is no 'tiny' among its scales"):
        load_recipe(write(tmp_path, {**content, "scale": "tiny"}))
    content["transfer"]["size"] = 10  # as a search writes it down that was run at this scale
    assert load_recipe(write(tmp_path, content)).recipe.scale == "cpu"


def test_a_scale_is_put_over_the_recipe_and_overrides_over_the_scale(tmp_path: Path) -> None:
    content = plain()
    content["scales"] = {"small": {"transfer.size": 7, "compression.pruning.config_list.0.sparse_ratio": 0.25}}
    name = write(tmp_path, content)
    recipe = load_recipe(name, scale="small").recipe
    assert recipe.transfer.size == 7
    assert recipe.compression.pruning is not None
    assert recipe.compression.pruning.config_list[0]["sparse_ratio"] == 0.25
    assert load_recipe(name, ["transfer.size=9"], scale="small").recipe.transfer.size == 9
    with pytest.raises(UserError, match="no scale 'large'; it has full, small"):
        load_recipe(name, scale="large")
    content["scales"]["small"] = {"transfer.size.x": 1}
    with pytest.raises(UserError, match=r"scales\.small transfer\.size\.x: transfer\.size is \d+, which has no keys"):
        load_recipe(write(tmp_path, content), scale="small")


# Mutations.

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([10**9, -(10**30), 1e308, float("nan"), float("inf"), 0.5, -0.1])
    | st.text(max_size=5)
    | st.sampled_from(
        ["zoo:lenet5", "zskd", "best", "paper", "uniform", "file.py:x", "none", "noise", "AGPPruner", "$x"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.integers(0, 3) | st.sampled_from(["steps", "model"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        found.extend(places(value, (*path, key)))
    return found


EXTRA = {
    "student": {"model": "zoo:lenet5_half", "arguments": {}, "weights": None},
    "selected_on": None,
    "seed": 3,
}


@settings(max_examples=350, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(packaged_names()), count=st.integers(1, 3))
def test_mutated_recipes_load_or_are_refused_in_one_sentence(tmp_path: Path, data, name: str, count: int) -> None:
    content = {**plain(name), **copy.deepcopy(EXTRA)}
    content["transfer"].update(synthesis={"max_steps": 5, "tolerance": None}, targets={"betas": [1.0]})
    for _ in range(count):
        path = data.draw(st.sampled_from(places(content)))
        place = content
        for key in path[:-1]:
            place = place[key]
        how = data.draw(st.sampled_from(["replace", "replace", "delete", "rename", "add"]))
        if how == "replace":
            place[path[-1]] = data.draw(values)
        elif how == "delete":
            del place[path[-1]]
        elif how == "rename" and isinstance(place, dict):
            place[data.draw(st.text(max_size=6))] = place.pop(path[-1])
        elif isinstance(place, dict):
            place[data.draw(st.text(max_size=6) | st.integers(0, 9))] = data.draw(values)
        if not content or not places(content):
            break
    try:
        assert isinstance(load_recipe(write(tmp_path, content)), LoadedRecipe)
    except UserError as error:
        assert str(error)


# The machinery behind it.


def test_build_settings_from_plain_values() -> None:
    settings = build_settings(SynthesisSettings, {"max_steps": 3, "total_variation": [0.1, 0.2]})
    assert settings == SynthesisSettings(max_steps=3, total_variation=(0.1, 0.2))
    nested = build_settings(DistillationSettings, {"augmentation": {"scale": [0.5, 1]}})
    assert nested.augmentation.scale == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"unknown key 'here.learning_rat'; did you mean 'learning_rate'\?"):
        build_settings(SynthesisSettings, {"learning_rat": 1}, "here")
    with pytest.raises(ValueError, match="here: learning_rate must be positive"):
        build_settings(SynthesisSettings, {"learning_rate": 0}, "here")


def test_hints_follow_optional_and_listed_sections() -> None:
    class Inner(BaseModel):
        model_config = ConfigDict(extra="forbid")
        width: int = 1

    class Outer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        parts: list[Inner] = []
        maybe: Inner | None = None
        must: int

    with pytest.raises(ValueError, match=r"'parts.1.widht'; did you mean 'width'"):
        build_settings(Outer, {"must": 1, "parts": [{}, {"widht": 2}]})
    with pytest.raises(ValueError, match=r"'maybe.widht'; did you mean 'width'"):
        build_settings(Outer, {"must": 1, "maybe": {"widht": 2}})
    with pytest.raises(ValueError, match="the key 'must' is missing"):
        build_settings(Outer, {})


@pytest.mark.parametrize(
    "content", ['{"name": "\\udafb\\uddc6"}', '{"scales": {"cpu": {"a\\n\\udafb\\uddc6": false}}}', 'name: "\\uD800"']
)
def test_half_a_character_is_refused(tmp_path, content):
    """JSON escapes a character beyond U+FFFF as two halves, which YAML leaves apart; nothing can write them down."""
    (tmp_path / "recipe.yml").write_text(content)
    with pytest.raises(UserError, match="half a character") as refused:
        load_recipe(str(tmp_path / "recipe.yml"))
    str(refused.value).encode()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.input.shape=[1, 32]", r"teacher\.input\.shape: entry 3 is missing"),
        ("teacher.input.mean=0.5", r"teacher\.input\.mean: input should be a list, not 0\.5"),
        ("teacher.model=lenet5", r"a network is named as .*, not 'lenet5'"),
    ],
)
def test_common_slips_are_said_in_words_of_the_recipe(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(DIGITS, [override])


def test_a_recipe_file_named_without_its_ending_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, plain())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean recipe\.yml\?"):
        load_recipe("recipe")


def test_networks_of_other_packages_are_named_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shell" / "folder").mkdir(parents=True)
    (tmp_path / "shell" / "net.onnx").write_bytes(b"")
    path = write(tmp_path, plain())
    monkeypatch.chdir(tmp_path / "shell")
    for model, expected in (("net.onnx", "shell/net.onnx"), ("transformers:folder", "transformers:shell/folder")):
        loaded = load_recipe(path, [f"teacher.model={model}", "teacher.weights=null"])
        assert loaded.recipe.teacher.model == expected
        (named,) = [each for each in named_files(loaded.source) if each.key_path == "teacher.model"]
        assert named.path(loaded.base).exists()
        named.rename("other")
        assert named.text == ("other" if model == "net.onnx" else "transformers:other")
