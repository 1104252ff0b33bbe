"""Impressions made on another device: as good as those of the CPU, and made without waiting for it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, digits_network, random, small_network, small_teacher, soft_targets

from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import alexnet
from zskd_nni.runtime import signals
from zskd_nni.synthesis import ImpressionStore, ShardInputs, SynthesisSettings, synthesize, synthesize_shard

Waits = Callable[[], contextlib.AbstractContextManager[Counter[str]]]

WAYS: dict[str, dict[str, Any]] = {
    "all together": {},
    "as soon as they fit": {"tolerance": 0.05, "patience": 8},
    "each its own limit": {"max_steps": (5, 30)},
    "rescaled, on from the last": {"range": "rescale", "warm_start": True},
    "near the statistics": {"batch_statistics": 1.0},
}


def inputs_for(count: int, limit: float, spec: InputSpec = SMALL, classes: int = 5) -> ShardInputs:
    return ShardInputs(
        soft_targets(count, classes),
        torch.rand((count, *spec.shape), generator=random(1)),
        torch.full((count, 1), 20.0),
        torch.full((count,), 0.01),
        torch.full((count,), limit),
        (torch.rand((count, 1, *spec.shape[1:]), generator=random(2)) < 0.8).float(),
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_same_orders_come_to_the_same_fit(way: str, device: torch.device, tmp_path: Path) -> None:
    settings = SynthesisSettings(**{"max_steps": 30, "learning_rate": 0.05, "shard": 20, "slots": 8, **WAYS[way]})
    stores = []
    for place in (torch.device("cpu"), device):
        teacher = small_teacher().to(place)
        plan, folder = ZskdTargets(teacher, ZskdSettings()), tmp_path / place.type
        stores.append(synthesize(teacher, plan, settings, size=40, seed=3, folder=folder, quiet=True))
    here, there = (store.read(0) for store in stores)
    torch.testing.assert_close(there.targets, here.targets, rtol=1e-4, atol=1e-6)
    assert float(there.fit.mean()) == pytest.approx(float(here.fit.mean()), rel=0.02, abs=1e-4)
    one_step = replace(settings, max_steps=1)
    begun = synthesize(teacher, plan, one_step, size=40, seed=3, folder=tmp_path / "begun", quiet=True).read(0)
    share = 1 if settings.batch_statistics else 0.95  # where there is more to come near than the targets
    assert float(there.fit.mean()) < share * float(begun.fit.mean()), "nothing was optimised"
    assert there.images.device.type == "cpu"


@pytest.mark.parametrize("preset", ["paper", "best", "author-code"])
def test_presets_on_a_real_teacher(preset: str, device: torch.device, tmp_path: Path) -> None:
    method, fits = find_method("zskd"), []
    changed = {"synthesis": {"max_steps": 20}} if preset != "best" else {}
    for place in (torch.device("cpu"), device):
        teacher = Teacher(digits_network(), InputSpec((1, 32, 32))).to(place)
        options, folder = method.options(preset, changed), tmp_path / place.type
        method.source(teacher, TransferRequest(40, 20, 0, folder, options, quiet=True))
        fits.append(ImpressionStore.open(folder).summary()["mean_fit"])
    assert fits[1] == pytest.approx(fits[0], rel=0.05)


@pytest.mark.parametrize("name", ["sts", "class-impressions"])
def test_the_other_methods_that_optimise_images(name: str, device: torch.device, tmp_path: Path) -> None:
    method, fits = find_method(name), []
    for place in (torch.device("cpu"), device):
        teacher = Teacher(digits_network(), InputSpec((1, 32, 32))).to(place)
        options, folder = method.options("paper", {"synthesis": {"max_steps": 20}}), tmp_path / place.type
        method.source(teacher, TransferRequest(40, 20, 0, folder, options, quiet=True))
        fits.append(ImpressionStore.open(folder).summary()["mean_fit"])
    assert fits[1] == pytest.approx(fits[0], rel=0.1)


@pytest.mark.parametrize("name", ["zskd", "ats", "real"])
def test_images_lie_where_they_are_wanted(name: str, device: torch.device, tmp_path: Path) -> None:
    method = find_method(name)
    changed = {"data": "digits"} if name == "real" else {"synthesis": {"max_steps": 2}} if name == "zskd" else {}
    teacher = Teacher(digits_network(), InputSpec((1, 32, 32))).to(device)
    source = method.source(teacher, TransferRequest(40, 20, 0, tmp_path, method.options("paper", changed), quiet=True))
    assert source.batch(0, random(0)).device == device


def test_a_teacher_with_response_norms_in_colour(device: torch.device) -> None:
    spec = InputSpec((3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    torch.manual_seed(0)
    network = alexnet()
    settings = SynthesisSettings(learning_rate=0.05, slots=4, shard=8)
    fits = []
    for place in ("cpu", device):
        teacher = Teacher(network, spec).to(place)
        fits.append(synthesize_shard(teacher, inputs_for(8, 6.0, spec, 10), settings).fit)
    torch.testing.assert_close(fits[1], fits[0], rtol=0.02, atol=1e-4)


def test_a_store_begun_here_goes_on_there(device: torch.device, tmp_path: Path) -> None:
    settings = SynthesisSettings(max_steps=8, shard=20, slots=10)
    calls = [0]

    def stop(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 25:  # in the second shard
            raise KeyboardInterrupt

    teacher = small_teacher()
    handle = teacher.model.register_forward_hook(stop)
    options: dict[str, Any] = {"size": 60, "seed": 3, "folder": tmp_path / "store", "quiet": True}
    with contextlib.suppress(KeyboardInterrupt, signals.Interrupted):
        synthesize(teacher, ZskdTargets(teacher, ZskdSettings()), settings, **options)
    handle.remove()
    before = len(ImpressionStore.open(tmp_path / "store").manifest["shards"])
    assert 0 < before < 3
    teacher = small_teacher().to(device)
    store = synthesize(teacher, ZskdTargets(teacher, ZskdSettings()), settings, **options)
    assert len(store.manifest["shards"]) == 3
    assert len(store.images()) == 60


def test_no_step_waits_for_the_device(device: torch.device, waits: Waits) -> None:
    """More steps of images that take as many as their limits say: not one more wait."""
    counts = []
    for limit in (10.0, 40.0):
        teacher = Teacher(small_network(), SMALL).to(device)
        with waits() as found:
            synthesize_shard(teacher, inputs_for(30, limit), SynthesisSettings(slots=10, learning_rate=0.05))
        counts.append(found)
    assert counts[1] == counts[0]


def test_images_that_leave_as_they_fit_are_asked_once_a_step(device: torch.device, waits: Waits) -> None:
    counts = []
    for limit in (10.0, 20.0):
        teacher = small_teacher().to(device)
        settings = SynthesisSettings(slots=10, tolerance=1e-9, learning_rate=0.05)
        with waits() as found:
            synthesize_shard(teacher, inputs_for(10, limit), settings)
        counts.append(sum(found.values()))
    assert counts[1] - counts[0] == 10
