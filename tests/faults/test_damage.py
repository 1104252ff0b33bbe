"""Damaged files: found by name, made again or refused, and never used silently."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import amount, only_long
from helpers import make_store, manifest_of, same_store, shard_hashes, train
from subjects import TINY
from torch import Tensor

from zskd_nni.data import candidates
from zskd_nni.methods.ats import method as ats
from zskd_nni.methods.ats.transfer_set import DESCRIPTION, IMAGES
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, sha256_of_file
from zskd_nni.runtime.tensors import load_sealed, load_tensors, save_sealed, save_tensors
from zskd_nni.synthesis import ImpressionStore

SIZE, SHARDS = 60, 6


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "store"
    make_store(folder, size=SIZE, shard=10)
    return folder


def shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


# Damage of bytes, drawn at random: of any file.


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def lengthened(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 50))


def one_bit(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def one_bit_of_the_header(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(min(400, len(content)))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def zeros_inside(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]


def shuffled(content: bytes, chance: random.Random) -> bytes:
    middle = chance.randrange(1, len(content))
    return content[middle:] + content[:middle]


def empty(content: bytes, chance: random.Random) -> bytes:
    return b""


HARMS = [cut, lengthened, one_bit, one_bit_of_the_header, zeros_inside, shuffled, empty]


def harmed(content: bytes, number: int) -> bytes:
    chance = random.Random(number)
    while True:
        result = HARMS[number % len(HARMS)](content, chance)
        if result != content:
            return result


@pytest.mark.parametrize("batch", range(amount(2, 6)))
def test_damaged_shards_are_named_and_made_again(sound: Path, tmp_path: Path, batch: int) -> None:
    """Forty generated damages a batch, several shards at once."""
    chance, number = random.Random(batch), 0
    store = Path(shutil.copytree(sound, tmp_path / "store"))
    while number < 40:
        chosen = sorted(chance.sample(range(SHARDS), chance.randrange(1, SHARDS + 1)))
        for index in chosen:
            shard(store, index).write_bytes(harmed(shard(store, index).read_bytes(), 1000 * batch + number))
            number += 1
        opened = ImpressionStore.open(store)
        assert opened.missing() == chosen
        for index in chosen:
            assert opened.shard_problem(index) == "not as written"
            with pytest.raises(UserError, match=shard(store, index).name):
                opened.read(index)
        with pytest.raises(UserError, match=shard(store, chosen[0]).name):
            opened.images()
        make_store(store, size=SIZE, shard=10)
        assert same_store(sound, store)


FORGERIES: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "fewer": lambda t: t.update({name: value[:7] for name, value in t.items()}),
    "other images": lambda t: t.update(images=t["images"][..., :4]),
    "flat images": lambda t: t.update(images=t["images"].flatten(1)),
    "more channels": lambda t: t.update(images=t["images"].repeat(1, 3, 1, 1)),
    "integer images": lambda t: t.update(images=t["images"].to(torch.uint8)),
    "NaN": lambda t: t["images"][3].fill_(float("nan")),
    "infinite logits": lambda t: t["logits"][0].fill_(float("inf")),
    "fewer classes": lambda t: t.update(targets=t["targets"][:, :3]),
    "a scalar": lambda t: t.update(fit=torch.tensor(1.0)),
    "no targets": lambda t: t.pop("targets"),
    "something else": lambda t: t.update(more=torch.zeros(10)),
    "float steps": lambda t: t.update(steps=t["steps"].float()),
    "wide fit": lambda t: t.update(fit=torch.zeros(10, 2)),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda name: name.replace(" ", "-"))
def test_wrong_shards_are_refused_even_where_the_manifest_was_forged_with_them(
    sound: Path, tmp_path: Path, forgery: str
) -> None:
    store = Path(shutil.copytree(sound, tmp_path / "store"))
    tensors = {name: value.clone() for name, value in load_tensors(shard(store, 2))[0].items()}
    FORGERIES[forgery](tensors)
    checksum = save_tensors(shard(store, 2), tensors)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"]["2"]["sha256"] = checksum
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-00002\.safetensors does not hold the 10 impressions planned"):
        ImpressionStore.open(store).images()


def mutations(content: Any, chance: random.Random) -> Any:
    """A JSON value, or a state with tensors, with one thing in it changed, removed or added."""
    if isinstance(content, Tensor) and chance.random() < 0.85:
        changes = (lambda t: t[:0], lambda t: t.double(), lambda t: t.unsqueeze(0))
        return chance.choice(changes)(torch.atleast_1d(content))
    values: list[Any] = [None, True, -1, 0, 10**30, 1.5, float("nan"), "x", "", [], {}, [1], {"0": 1}, "²", 10**9]
    if isinstance(content, dict) and content and chance.random() < 0.85:
        key = chance.choice(list(content))
        kind = chance.random()
        if kind < 0.2:
            return {name: value for name, value in content.items() if name != key}
        if kind < 0.3:
            return {**content, chance.choice(["", "0", "7", "99999", "x", "../x", "9" * 5000]): chance.choice(values)}
        return {**content, key: mutations(content[key], chance)}
    if isinstance(content, list) and content and chance.random() < 0.7:
        place = chance.randrange(len(content))
        return [*content[:place], mutations(content[place], chance), *content[place + 1 :]]
    return chance.choice(values)


def test_edited_manifests_are_refused_repaired_or_mean_the_same(sound: Path, tmp_path: Path) -> None:
    """Whatever is changed in a manifest: one sentence, or the same impressions."""
    good = json.loads((sound / "manifest.json").read_text())
    refused = again = 0
    for number in range(amount(80, 400)):
        store = tmp_path / "store"
        shutil.copytree(sound, store)
        edited = mutations(good, random.Random(number))
        (store / "manifest.json").write_text(json.dumps(edited))
        before = shard_hashes(store)
        try:
            make_store(store, size=SIZE, shard=10)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and ("manifest.json" in str(error) or str(store) in str(error))
            assert shard_hashes(store) == before
        else:
            again += 1
            assert shard_hashes(store) == shard_hashes(sound), edited
            opened = ImpressionStore.open(store)
            assert torch.equal(opened.images(), ImpressionStore.open(sound).images())
            assert opened.summary()["impressions"] == SIZE
        shutil.rmtree(store)
    assert refused and again


# Checkpoints.


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(signals.Interrupted), signals.stoppable():
        train(folder, steps=30, stop=12)
    return folder / "run.pt"


def test_damaged_checkpoints_are_refused_by_name(checkpointed: Path, tmp_path: Path) -> None:
    """Any bit: of the header, the counters, the weights and the moments."""
    content = checkpointed.read_bytes()
    for number in range(amount(60, 300)):
        path = tmp_path / "run.pt"
        path.write_bytes(harmed(content, number))
        with pytest.raises(UserError, match=r"run\.pt"):
            train(tmp_path, steps=30)
    path.write_bytes(content)
    train(tmp_path, steps=30)


def test_forged_checkpoints_are_refused_or_run(checkpointed: Path, tmp_path: Path) -> None:
    """With a right checksum, but another content: refused by name, or a run of the same shape."""
    state = load_sealed(checkpointed)
    for number in range(amount(60, 300)):
        save_sealed(tmp_path / "run.pt", mutations(state, random.Random(number)))
        try:
            train(tmp_path, steps=30)
        except UserError as error:
            assert "\n" not in str(error)


def test_a_damaged_progress_of_a_transfer_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subjects import arbitrary_set

    monkeypatch.setattr(candidates, "_BLOCK", 50)
    arbitrary_set(tmp_path / "whole")
    calls = [0]

    def stop_after_three() -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise signals.Interrupted(15)

    with monkeypatch.context() as patched:
        patched.setattr(signals, "check", stop_after_three)
        with pytest.raises(signals.Interrupted):
            arbitrary_set(tmp_path / "stopped")
    progress = tmp_path / "stopped" / "set" / ats.PROGRESS
    content = progress.read_bytes()
    for number in range(amount(21, 100)):
        progress.write_bytes(harmed(content, number))
        with pytest.raises(UserError, match=r"progress\.pt"):
            arbitrary_set(tmp_path / "stopped")
    progress.write_bytes(content)
    arbitrary_set(tmp_path / "stopped")
    for name in (IMAGES, DESCRIPTION):
        assert sha256_of_file(tmp_path / "stopped" / "set" / name) == sha256_of_file(tmp_path / "whole" / "set" / name)
    images = tmp_path / "whole" / "set" / IMAGES
    images.write_bytes(harmed(images.read_bytes(), 5))
    arbitrary_set(tmp_path / "whole")
    assert sha256_of_file(images) == sha256_of_file(tmp_path / "stopped" / "set" / IMAGES)


# A recipe's folder.


def run(out: Path) -> dict[str, Any]:
    return Run(load_recipe("digits-prune50", TINY), out, quiet=True).compress()


def state_of(out: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in sorted((out / "state").glob("*.safetensors"))}


@only_long
def test_a_recipes_folder_survives_damage_to_any_of_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file in turn, in another way: the same student in the end, or a sentence that names the file."""
    out = tmp_path / "out"
    run(out)
    state, student = state_of(out), sha256_of_file(out / "student.safetensors")
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)
    for number, path in enumerate(files):
        if path.parent == out and path.name not in ("run.json", "student.json"):
            continue  # written anew by every run
        path.write_bytes(harmed(path.read_bytes(), number))
        try:
            run(out)
        except UserError as error:
            assert path.name in str(error) or (path.name == "run.json" and str(out) in str(error)), f"{path}: {error}"
            shutil.rmtree(out)
            shutil.copytree(kept, out)
        else:
            capsys.readouterr()
        if path.name.endswith("-pruned.safetensors"):  # nobody reads it once the student that it became is there
            shutil.copy(kept / path.relative_to(out), path)
        assert state_of(out) == state
        assert sha256_of_file(out / "student.safetensors") == student


@pytest.mark.parametrize(
    "seconds", [[1, 2], "x", None, {"a": "b"}, {"a": float("nan")}, {"synthesis": True}], ids=lambda value: str(value)
)
def test_edited_times_do_no_harm(tmp_path: Path, seconds: object) -> None:
    opened = Run(load_recipe("digits-prune50", TINY), tmp_path, quiet=True)
    with opened.owned():
        pass
    known = read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_text(json.dumps({**known, "seconds": seconds}))
    with opened.owned():
        assert opened.seconds == {}


# What a run is.


def test_a_shard_made_again_elsewhere_is_noted_and_told(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(sound, tmp_path / "store"))
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["environment"]["torch"] = "2.11.0"
    (store / "manifest.json").write_text(json.dumps(manifest))
    make_store(store, size=SIZE, shard=10)
    assert capsys.readouterr().err == "", "nothing is to be made"
    shard(store, 1).unlink()
    make_store(store, size=SIZE, shard=10)
    assert f"begun with torch 2.11.0, and continues with {torch.__version__}" in capsys.readouterr().err
    entries = manifest_of(store)["shards"]
    assert entries["1"]["environment"] == {"torch": str(torch.__version__)}
    assert all("environment" not in entry for index, entry in entries.items() if index != "1")


FACTORY = "from helpers import SmallNet\ndef net(classes=5):\n    return SmallNet(classes)\n"


def test_another_student_or_other_code_is_another_run(tmp_path: Path) -> None:
    from helpers import small_network

    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "other.py").write_text(FACTORY)
    for seed, name in ((0, "t"), (1, "s"), (2, "s2")):
        save_tensors(tmp_path / f"{name}.safetensors", small_network(seed).state_dict())
    recipe = {
        "name": "mine",
        "teacher": {"model": "mine.py:net", "weights": "t.safetensors", "input": {"shape": [1, 8, 8]}},
        "student": {"model": "other.py:net", "weights": "s.safetensors"},
        "transfer": {"size": 20, "held_out": 10, "synthesis": {"max_steps": 2}},
        "distillation": {"steps": 3},
        "controls": [],
    }
    (tmp_path / "mine.yml").write_text(json.dumps(recipe))

    def begin() -> None:
        with Run(load_recipe(str(tmp_path / "mine.yml")), tmp_path / "out", quiet=True).owned():
            pass

    begin()
    begin()
    shutil.copy(tmp_path / "s.safetensors", tmp_path / "kept")
    shutil.copy(tmp_path / "s2.safetensors", tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=r"belongs to another run \(student is"):
        begin()
    shutil.copy(tmp_path / "kept", tmp_path / "s.safetensors")
    begin()
    for file in ("mine.py", "other.py"):
        (tmp_path / file).write_text(FACTORY + "# another activation, say\n")
        with pytest.raises(UserError, match=rf"belongs to another run \(code\.{file}:net is"):
            begin()
        (tmp_path / file).write_text(FACTORY)
    begin()
