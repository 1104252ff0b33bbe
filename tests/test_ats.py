"""ATS: balance by the teacher's own labels, against a loop; scarce classes; the store; bad input."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, make_store, prepare_torch, random, small_teacher, start_process, wait_for
from PIL import Image
from torch import Tensor, nn

from zskd_nni.data import candidates
from zskd_nni.data.candidates import PROCEDURAL, Candidates, procedural_images
from zskd_nni.methods.ats import method as ats
from zskd_nni.methods.ats.balance import NEAREST, OWN, REPEAT, AtsSettings
from zskd_nni.methods.ats.method import make_transfer_set
from zskd_nni.methods.ats.transfer_set import TransferSet
from zskd_nni.methods.registry import TransferRequest, find_method, is_data_free
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import load_tensors

SIZE = 200


def brightness_teacher(classes: int = 5, sharpness: float = 30.0, spec: InputSpec = SMALL) -> Teacher:
    """Class k of K are images whose mean lies nearest to (k + 1/2) / K of the value range."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(spec.shape)), classes))
    centres = spec.low + (torch.arange(classes) + 0.5) / classes * (spec.high - spec.low)
    with torch.no_grad():  # -(m - c)^2 up to m^2, which all classes share
        network[1].weight.copy_(
            (2 * sharpness * centres / network[1].in_features)[:, None].expand_as(network[1].weight)
        )
        network[1].bias.copy_(-sharpness * centres**2)
    return Teacher(network, spec)


def made(folder: Path, teacher: Teacher | None = None, size: int = SIZE, seed: int = 0, **changes: Any) -> TransferSet:
    settings = AtsSettings(**{"sources": ("structured",), **changes})
    return make_transfer_set(teacher or brightness_teacher(), settings, size=size, seed=seed, folder=folder, quiet=True)


def by_mean(images: Tensor, classes: int = 5) -> list[int]:
    """The brightness teacher's labels without the teacher."""
    return [
        min(range(classes), key=lambda k: abs(float(image.double().mean()) - (k + 0.5) / classes)) for image in images
    ]


def pool(settings: AtsSettings, size: int = SIZE, seed: int = 0) -> Tensor:
    candidates = Candidates(settings.sources, SMALL, settings.candidates * size, seed)
    return torch.cat([candidates.block(number) for number in range(len(candidates))])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_BLOCK", 150)


def bundle(found: TransferSet) -> tuple[Tensor, Tensor, Tensor]:
    tensors = load_tensors(found.folder / "set.safetensors")[0]
    return tensors["images"], tensors["labels"], tensors["origins"]


# Balancing.


def test_balanced_by_the_teachers_labels_against_a_loop(tmp_path: Path) -> None:
    settings = AtsSettings(sources=("structured",))
    everything = pool(settings).half()
    room: dict[int, list[Tensor]] = defaultdict(list)
    for image, k in zip(everything, by_mean(everything), strict=True):
        if len(room[k]) < SIZE // 5:
            room[k].append(image)
    assert all(len(images) == 40 for images in room.values()), "this source fills all classes"
    images, labels, origins = bundle(made(tmp_path))
    assert len(images) == SIZE
    for k in range(5):
        assert torch.equal(images[labels == k], torch.stack(room[k])), k
    assert not origins.any()


@pytest.mark.parametrize("size", [200, 203, 204])
def test_the_quota_is_rounded_down(tmp_path: Path, size: int) -> None:
    found = made(tmp_path, size=size)
    assert found.counts["own"] == [40] * 5
    assert found.description["quota"] == 40
    assert len(found.images()) == 200


def test_unbalanced_takes_them_as_they_come(tmp_path: Path) -> None:
    settings = AtsSettings(sources=("structured",), balanced=False)
    found = made(tmp_path, balanced=False)
    first = pool(settings)[:SIZE].half()
    assert torch.equal(found.images(), first)
    assert found.counts["own"] == np.bincount(by_mean(first), minlength=5).tolist()
    assert len(set(found.counts["own"])) > 1


def test_the_teacher_decides_not_the_labels_that_came_along(tmp_path: Path) -> None:
    images = (pool(AtsSettings(sources=("structured",)))[:900, 0] * 255).round().byte().numpy()
    np.savez(tmp_path / "given.npz", images=images, labels=np.zeros(900, dtype=np.int64))
    found = made(tmp_path / "set", sources=(str(tmp_path / "given.npz"),), size=100)
    kept, labels, _ = bundle(found)
    assert found.counts["own"] == [20] * 5
    assert by_mean(kept) == labels.tolist()
    originals = {image.tobytes() for image in images}
    assert all((image[0].float() * 255).round().byte().numpy().tobytes() in originals for image in kept)
    other = made(tmp_path / "other", sources=(str(tmp_path / "given.npz"),), size=100, seed=1)
    assert not torch.equal(other.images(), found.images()), "the order is drawn from the seed"


def test_a_file_gives_one_set_by_any_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    names = [scarce_pool(tmp_path, (60, 60, 60, 40, 50)), f"{tmp_path}/folder/../scarce.npz"]
    sets = [made(tmp_path / str(number), sources=(name,)) for number, name in enumerate(names)]
    for one, other in zip(*map(bundle, sets), strict=True):
        assert torch.equal(one, other)


def test_sources_take_turns(tmp_path: Path) -> None:
    candidates = Candidates(("noise-uniform", "digits", "shapes"), SMALL, 400, 0)
    names = [name for name, _, _ in candidates.blocks]
    assert names[:4] == ["noise-uniform", "digits", "shapes", "noise-uniform"]
    assert names[-1] == "digits"
    assert candidates.total == 400 + 400 + 1437
    assert list(candidates.data) == ["digits"]


def test_a_network_of_a_hundred_classes(tmp_path: Path) -> None:
    found = made(tmp_path, brightness_teacher(100, 3000.0), size=350, fill="confidence", candidates=2)
    images, labels, _ = bundle(found)
    assert torch.equal(torch.bincount(labels), torch.full((100,), 3))
    assert len(images) == 300
    assert sum(found.counts["nearest"]) > 0, "the darkest and the brightest are rare"
    for k in range(100):
        assert found.counts["own"][k] + found.counts["nearest"][k] == 3


# Scarce classes.


def scarce_pool(folder: Path, counts: tuple[int, ...] = (60, 60, 60, 6, 0)) -> str:
    """An archive with so many images of each brightness class."""
    drawn = np.random.default_rng(0)
    images = np.concatenate(
        [
            np.clip(255 * (k + 0.5) / 5 + drawn.normal(0, 8, (count, 8, 8)), 0, 255).astype(np.uint8)
            for k, count in enumerate(counts)
        ]
    )
    np.savez(folder / "scarce.npz", images=images, labels=np.zeros(len(images), dtype=np.int64))
    return str(folder / "scarce.npz")


def test_scarce_classes_by_repeats_and_then_by_confidence(tmp_path: Path) -> None:
    teacher = brightness_teacher()
    found = made(tmp_path / "set", teacher, size=100, sources=(scarce_pool(tmp_path),))
    assert found.counts["candidates"] == [60, 60, 60, 6, 0]
    assert found.counts["own"] == [20, 20, 20, 6, 0]
    assert found.counts["repeats"] == [0, 0, 0, 14, 0]
    assert found.counts["nearest"] == [0, 0, 0, 0, 20]
    images, labels, origins = bundle(found)
    assert torch.equal(torch.bincount(labels), torch.full((5,), 20))
    repeats = images[origins == REPEAT]
    assert by_mean(repeats) == [3] * 14, "the teacher still sees the class in a repeat"
    own = {image.numpy().tobytes() for image in images[origins == OWN]}
    assert not any(image.numpy().tobytes() in own for image in repeats)
    assert len({image.numpy().tobytes() for image in repeats}) == 14


def test_confidence_takes_what_was_not_taken_in_the_order_of_the_teachers_probability(tmp_path: Path) -> None:
    teacher, source = brightness_teacher(), scarce_pool(tmp_path)
    found = made(tmp_path / "set", teacher, size=100, sources=(source,), fill="confidence")
    assert found.counts["repeats"] == [0] * 5
    assert found.counts["nearest"] == [0, 0, 0, 14, 20]
    # The loop: what is left over behind the quotas, by the probability of the class.
    candidates = Candidates((source,), SMALL, 0, 0)
    everything = torch.cat([candidates.block(number) for number in range(len(candidates))]).half()
    labels, left, taken = by_mean(everything), [], [0] * 5
    for number, k in enumerate(labels):
        taken[k] += 1
        if taken[k] > 20:
            left.append(number)
    probabilities = teacher.predict(everything.float()).softmax(1)
    images, classes, origins = bundle(found)
    for k, count in ((3, 14), (4, 20)):
        best = sorted(left, key=lambda number: -float(probabilities[number, k]))[:count]
        expected = sorted(round(float(probabilities[number, k]), 7) for number in best)
        chosen = images[(classes == k) & (origins == NEAREST)]
        assert expected == sorted(round(float(p), 7) for p in teacher.predict(chosen.float()).softmax(1)[:, k]), k


def test_scarce_classes_stay_short_on_request(tmp_path: Path) -> None:
    found = made(tmp_path / "set", size=100, sources=(scarce_pool(tmp_path),), fill="none")
    assert found.counts["own"] == [20, 20, 20, 6, 0]
    assert len(found.images()) == 66
    assert found.counts["repeats"] == found.counts["nearest"] == [0] * 5


@pytest.mark.parametrize("source", ["noise-uniform", "noise-gaussian"])
def test_a_teacher_that_puts_everything_into_one_class(tmp_path: Path, source: str) -> None:
    teacher = brightness_teacher(spec=InputSpec((1, 32, 32)))  # the mean of noise lies near the middle
    with pytest.raises(UserError, match="cannot balance") as raised:
        made(tmp_path, teacher, sources=(source,))
    assert f"{source}: the teacher puts all 4,000 candidates into class 2" in str(raised.value)
    assert "0: 0, 1: 0, 2: 4,000, 3: 0, 4: 0" in str(raised.value)
    assert not (tmp_path / "set.json").exists()
    assert made(tmp_path, teacher, sources=(source,), balanced=False).counts["own"] == [0, 0, 200, 0, 0]


# Sources.


@pytest.mark.parametrize("kind", PROCEDURAL)
def test_procedural_sources(kind: str) -> None:
    spec = InputSpec((3, 16, 16), low=-1, high=3)
    images = procedural_images(kind, 300, spec, random(0), 0.25)
    assert images.shape == (300, 3, 16, 16)
    assert float(images.min()) >= -1
    assert float(images.max()) <= 3
    assert torch.equal(images, procedural_images(kind, 300, spec, random(0), 0.25))
    assert not torch.equal(images, procedural_images(kind, 300, spec, random(1), 0.25))
    if kind.startswith("noise"):
        assert float(images.mean()) == pytest.approx(1, abs=0.02)
        expected = 4 / 12**0.5 if kind == "noise-uniform" else 0.97 * 1.0  # clamped at two deviations
        assert float(images.std()) == pytest.approx(expected, rel=0.04)


def write_pictures(folder: Path) -> None:
    drawn = np.random.default_rng(0)
    for number in range(40):
        grey = np.clip(drawn.uniform(0, 255) + drawn.normal(0, 5, (10, 10, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:02d}.png")


def test_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures")
    found = made(tmp_path / "set", size=25, sources=(str(tmp_path / "pictures"),))
    assert sum(found.counts["candidates"]) <= 40
    assert torch.equal(torch.bincount(bundle(found)[1]), torch.full((5,), 5))


def test_bad_sources(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(UserError, match=r"pictures holds no images"):
        made(tmp_path / "set", sources=(str(pictures),))
    write_pictures(pictures)
    (pictures / "07.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"07\.png cannot be read as an image"):
        made(tmp_path / "set", sources=(str(pictures),))
    with pytest.raises(UserError, match=r"ATS has no source 'shape': name one of noise-uniform, .*shapes.*mnist"):
        made(tmp_path / "set", sources=("shape",))
    with pytest.raises(UserError, match=r"less than one for each of the teacher's 5 classes; ask for at least 5"):
        made(tmp_path / "set", size=4)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no array"):
        made(tmp_path / "set", sources=(str(tmp_path / "bad.npz"),))


# The store.


def test_made_once_and_alike_everywhere(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b")
    assert torch.equal(first.images(), second.images())
    assert first.description == second.description
    before = (tmp_path / "a" / "set.safetensors").stat().st_mtime_ns
    again = made(tmp_path / "a")
    assert (tmp_path / "a" / "set.safetensors").stat().st_mtime_ns == before
    assert again.description == first.description
    assert not torch.equal(made(tmp_path / "c", seed=1).images(), first.images())
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir() if entry.name != ".lock") == [
        "set.json",
        "set.safetensors",
    ]


def test_another_set_is_refused_with_the_difference(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(UserError, match=r"another transfer set \(settings\.fill is 'augment' there, 'none' here\)"):
        made(tmp_path, fill="none")
    with pytest.raises(UserError, match=r"teacher is"):
        made(tmp_path, brightness_teacher(sharpness=20.0))
    with pytest.raises(UserError, match=r"seed is 0 there, 1 here"):
        made(tmp_path, seed=1)


def test_damage_is_noticed_and_mended(tmp_path: Path) -> None:
    found = made(tmp_path)
    images, path = found.images(), tmp_path / "set.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"not as written"):
        found.images()
    assert torch.equal(made(tmp_path).images(), images)
    path.unlink()
    assert torch.equal(made(tmp_path).images(), images)
    description = json.loads((tmp_path / "set.json").read_text())
    description["identity"]["seed"] = 5
    (tmp_path / "set.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"set\.json is not valid"):
        made(tmp_path)
    with pytest.raises(UserError, match="is not a transfer set"):
        TransferSet.open(tmp_path / "nothing")


def test_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tmp_path / "whole", brightness_teacher(100, 3000.0), size=350)
    looked_at: list[int] = []
    original = Candidates.block

    def block(self: Candidates, number: int) -> Tensor:
        looked_at.append(number)
        if number == 3 and looked_at.count(3) == 1:
            signals._pending = 15
        return original(self, number)

    monkeypatch.setattr(Candidates, "block", block)
    with pytest.raises(signals.Interrupted), signals.stoppable():
        made(tmp_path / "cut", brightness_teacher(100, 3000.0), size=350)
    assert (tmp_path / "cut" / "progress.pt").exists()
    found = made(tmp_path / "cut", brightness_teacher(100, 3000.0), size=350)
    assert looked_at.count(0) == looked_at.count(3) == looked_at.count(4) == 1, "nothing was looked at twice"
    assert torch.equal(found.images(), whole.images())
    assert found.description == whole.description
    assert not (tmp_path / "cut" / "progress.pt").exists()


def test_damaged_progress_says_what_to_remove(tmp_path: Path) -> None:
    (tmp_path / "progress.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"Remove .*progress\.pt to begin the set anew\."):
        made(tmp_path)


def test_sets_and_impressions_do_not_share_a_folder(tmp_path: Path) -> None:
    make_store(tmp_path / "store", size=20)
    with pytest.raises(UserError, match=r"store holds data impressions\. Use another folder"):
        made(tmp_path / "store")
    made(tmp_path / "set")
    with pytest.raises(UserError, match=r"set holds an arbitrary transfer set\. Use another folder"):
        make_store(tmp_path / "set", size=20)


def make_and_wait(folder: str) -> None:
    prepare_torch()
    original = ats._make

    def slow(*arguments: Any) -> TransferSet:
        (Path(folder) / "begun").touch()
        time.sleep(60)
        return original(*arguments)

    ats._make = slow
    made(Path(folder))


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    process = start_process(make_and_wait, str(tmp_path))
    try:
        wait_for(lambda: (tmp_path / "begun").exists())
        with pytest.raises(UserError, match="Another run is at work"):
            made(tmp_path)
    finally:
        process.kill()
        process.join()
    assert len(made(tmp_path).images()) == 200


# The method.


def test_presets_and_settings() -> None:
    method = find_method("ats")
    assert method.presets == ("paper", "unbalanced")
    assert method.options("paper", {}).balanced
    assert not method.options("unbalanced", {}).balanced
    options = method.options("paper", {"sources": ["digits", "noise-uniform"], "repeats": {"rotation": 3}})
    assert options.sources == ("digits", "noise-uniform")
    assert options.repeats.rotation == 3
    with pytest.raises(ValueError, match=r"unknown key 'source'; did you mean 'sources'"):
        method.options("paper", {"source": "digits"})
    with pytest.raises(ValueError, match="ats has paper, unbalanced, not 'best'"):
        method.options("best", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": ()}, "at least one source"),
        ({"split": "both"}, "split is train or test"),
        ({"fill": "copy"}, "fill is augment, confidence or none"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"tries": 0}, "tries must be at least 1"),
        ({"deviation": 0.0}, "deviation must be positive"),
    ],
)
def test_settings_outside_their_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtsSettings(**arguments)


def test_the_method_makes_a_source(tmp_path: Path) -> None:
    method = find_method("ats")
    request = TransferRequest(60, 8, 0, tmp_path / "i", method.options("paper", {}), quiet=True)
    source = method.source(small_teacher(), request)
    assert source.size == 60
    assert source.batch(0, random(0)).shape == (8, 1, 8, 8)
    assert source.fingerprint == method.source(small_teacher(), request).fingerprint


def test_digits_teacher_balances_its_own_kind(digits_teacher: Teacher, tmp_path: Path) -> None:
    found = made(tmp_path, digits_teacher, size=300, sources=("digits",), fill="none")
    assert found.counts["own"] == [30] * 10


def test_held_out_real_images_are_not_among_those_learnt_on(tmp_path: Path) -> None:
    method = find_method("ats")
    np.savez(tmp_path / "ramp.npz", images=distinct_images(500), labels=np.zeros(500, dtype=np.int64))
    options = method.options("unbalanced", {"sources": ["ramp.npz"]})

    def seen(folder: str, seed: int, size: int, held_out: bool) -> set[bytes]:
        request = TransferRequest(
            size, 8, seed, tmp_path / folder, options, quiet=True, held_out=held_out, base=tmp_path
        )
        return {image.numpy().tobytes() for image in method.source(brightness_teacher(), request).images}

    learnt, held_out = seen("a", 0, 450, False), seen("b", 7, 50, True)
    assert (len(learnt), len(held_out)) == (450, 50)
    assert not learnt & held_out
    assert not is_data_free(method, options)
    assert options.data == "ramp.npz"
    assert is_data_free(method, method.options("paper", {}))


def distinct_images(count: int) -> np.ndarray:
    images = np.zeros((count, 8, 8), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(count) % 250, np.arange(count) // 250
    return images
