"""The engine against plain loops with torch.optim.Adam, and results that it must refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, make_store, random, small_network, small_teacher, soft_targets
from torch import Tensor, nn

from zskd_nni.data.procedural import KINDS, start_images
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import Impressions, ShardInputs, SynthesisSettings, synthesize
from zskd_nni.synthesis import synthesize_shard as engine
from zskd_nni.training.losses import total_variation

TEMPERATURE = 20.0


def inputs_for(count: int, spec: InputSpec = SMALL, prior: float = 0.0, seed: int = 0, **options: Any) -> ShardInputs:
    starts = spec.low + (spec.high - spec.low) * torch.rand((count, *spec.shape), generator=random(seed))
    return ShardInputs(
        **{
            "targets": soft_targets(count, 5, seed),
            "starts": starts,
            "temperatures": torch.full((count, 1), TEMPERATURE),
            "prior": torch.full((count,), prior),
            "limits": torch.zeros(count),
            **options,
        }
    )


def rows_of(inputs: ShardInputs, rows: slice) -> ShardInputs:
    values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return ShardInputs(**{name: None if value is None else value[rows] for name, value in values.items()})


def synthesize_shard(
    teacher: Teacher, inputs: ShardInputs, settings: SynthesisSettings, on_finished: Callable[[int], None] | None = None
) -> Impressions:
    """The engine, with the settings' one step limit for all images."""
    if isinstance(settings.max_steps, int):
        inputs = dataclasses.replace(inputs, limits=torch.full((len(inputs.targets),), float(settings.max_steps)))
    return engine(teacher, inputs, settings, on_finished)


def settings_for(**values: Any) -> SynthesisSettings:
    return SynthesisSettings(**{"temperature": TEMPERATURE, "max_steps": 15, "learning_rate": 0.03, **values})


def cross_entropy(teacher: Teacher, images: Tensor, targets: Tensor, temperature: Tensor | float) -> Tensor:
    """Equation 5, row by row, written out."""
    scaled = teacher(images) / temperature
    log_sum = (scaled - scaled.max(1, keepdim=True).values).exp().sum(1, keepdim=True).log()
    return -(targets * (scaled - scaled.max(1, keepdim=True).values - log_sum)).sum(1)


def divergence(teacher: Teacher, images: Tensor, targets: Tensor, temperature: Tensor | float = TEMPERATURE) -> Tensor:
    with torch.no_grad():
        entropy = -torch.xlogy(targets, targets).sum(1)
        return cross_entropy(teacher, images, targets, temperature) - entropy


def plain_loop(
    teacher: Teacher,
    inputs: ShardInputs,
    settings: SynthesisSettings,
    rows: slice,
    clamp: bool = True,
    prior: bool = False,
) -> Tensor:
    """The published loop for the images ``rows``: Adam of PyTorch, clamp after every step."""
    spec = teacher.spec
    span = spec.high - spec.low
    images = inputs.starts[rows].clone().requires_grad_(True)
    adam = torch.optim.Adam([images], lr=settings.learning_rate * span)
    for _ in range(settings.max_steps):
        adam.zero_grad()
        loss = cross_entropy(teacher, images, inputs.targets[rows], inputs.temperatures[rows])
        loss = (loss * inputs.temperatures[rows][:, 0]).sum() / 20
        if prior:
            loss = loss + (inputs.prior[rows] * total_variation(images / span)).sum()
        loss.backward()
        if inputs.free is not None:
            images.grad *= inputs.free[rows]
        adam.step()
        if clamp:
            with torch.no_grad():
                images.clamp_(spec.low, spec.high)
    return images.detach()


def assert_results_belong_together(teacher: Teacher, inputs: ShardInputs, result: Impressions) -> None:
    """Logits and divergence are those of the very images that are kept, in the order of the targets."""
    assert torch.equal(result.targets, inputs.targets)
    torch.testing.assert_close(result.logits, teacher.predict(result.images), rtol=1e-4, atol=1e-4)
    expected = divergence(teacher, result.images, inputs.targets, inputs.temperatures)
    torch.testing.assert_close(result.fit, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [SMALL, InputSpec((1, 8, 8), low=-1, high=3, mean=(0.5,), std=(0.8,))])
@pytest.mark.parametrize("prior", [0.0, 1e-3])
def test_equals_a_plain_loop_step_by_step(spec: InputSpec, prior: float) -> None:
    teacher = Teacher(small_network(), spec)
    inputs = inputs_for(12, spec, prior)
    for steps in (1, 2, 5, 15):
        settings = settings_for(max_steps=steps, slots=12, total_variation=(prior, prior))
        result = synthesize_shard(teacher, inputs, settings)
        expected = plain_loop(teacher, inputs, settings, slice(0, 12), prior=prior > 0)
        torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-5 * (spec.high - spec.low))
        assert result.steps.tolist() == [steps] * 12
        assert_results_belong_together(teacher, inputs, result)


def test_temperature_of_each_image() -> None:
    teacher = small_teacher()
    inputs = inputs_for(9, temperatures=torch.linspace(2, 20, 9).unsqueeze(1))
    settings = settings_for(temperature=(2.0, 20.0), slots=4)
    result = synthesize_shard(teacher, inputs, settings)
    for row in range(9):
        alone = plain_loop(teacher, inputs, settings, slice(row, row + 1))
        torch.testing.assert_close(result.images[row : row + 1], alone, rtol=0, atol=1e-5)
    assert_results_belong_together(teacher, inputs, result)


def test_held_pixels_stay() -> None:
    teacher = small_teacher()
    free = (torch.rand((10, 1, 8, 8), generator=random(5)) < 0.5).float()
    inputs = inputs_for(10, free=free)
    result = synthesize_shard(teacher, inputs, settings_for(slots=4))
    held = (free == 0).expand_as(result.images)
    assert torch.equal(result.images[held], inputs.starts[held])
    assert float((result.images - inputs.starts)[~held].abs().mean()) > 0.05
    for row in (0, 9):
        alone = plain_loop(teacher, inputs, settings_for(), slice(row, row + 1))
        torch.testing.assert_close(result.images[row : row + 1], alone, rtol=0, atol=1e-5)


def test_the_objective_falls() -> None:
    teacher, inputs = small_teacher(), inputs_for(30)
    before = divergence(teacher, inputs.starts, inputs.targets)
    result = synthesize_shard(teacher, inputs, settings_for(max_steps=40))
    assert bool((result.fit < before).all())
    assert float(result.fit.mean()) < 0.8 * float(before.mean())


def test_callers_tensors_are_left_alone() -> None:
    teacher, inputs = small_teacher(), inputs_for(10, prior=1e-3)
    before = [getattr(inputs, name).clone() for name in ("targets", "starts", "temperatures", "prior")]
    first = synthesize_shard(teacher, inputs, settings_for(slots=3, total_variation=(1e-3, 1e-3)))
    after = [getattr(inputs, name) for name in ("targets", "starts", "temperatures", "prior")]
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, after, strict=True))
    second = synthesize_shard(teacher, inputs, settings_for(slots=3, total_variation=(1e-3, 1e-3)))
    assert torch.equal(first.images, second.images)
    assert all(p.grad is None for p in teacher.model.parameters())


# Slots.


@pytest.mark.parametrize("slots", [1, 4, 7, 30])
def test_refilled_slots_begin_afresh(slots: int) -> None:
    """Every image ends as if it were alone in the world, whichever slot it got and whoever was there before."""
    teacher, inputs = small_teacher(), inputs_for(17, temperatures=torch.ones(17, 1))
    settings = settings_for(slots=slots, tolerance=0.05, max_steps=20)
    result = synthesize_shard(teacher, inputs, settings)
    assert len(set(result.steps.tolist())) > 3, "the images must leave at different times"
    for row in range(17):
        one = slice(row, row + 1)
        single = synthesize_shard(teacher, rows_of(inputs, one), settings)
        assert single.steps[0] == result.steps[row]
        torch.testing.assert_close(result.images[one], single.images, rtol=0, atol=1e-5)
    assert_results_belong_together(teacher, inputs, result)


def test_number_of_slots_changes_nothing_but_time() -> None:
    teacher, inputs = small_teacher(), inputs_for(23)
    results = [synthesize_shard(teacher, inputs, settings_for(slots=slots)) for slots in (1, 5, 23, 250)]
    for other in results[1:]:
        torch.testing.assert_close(other.images, results[0].images, rtol=0, atol=1e-5)
        assert torch.equal(other.steps, results[0].steps)


def test_never_more_images_in_flight_than_slots() -> None:
    teacher, seen = small_teacher(), []
    teacher.model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    synthesize_shard(teacher, inputs_for(41, temperatures=torch.ones(41, 1)), settings_for(slots=6, tolerance=0.1))
    assert max(seen) == 6
    assert seen == sorted(seen, reverse=True), "slots are filled while there is something to fill them with"


def test_images_leave_as_soon_as_they_fit() -> None:
    teacher, inputs = small_teacher(), inputs_for(40, temperatures=torch.ones(40, 1))
    settings = settings_for(max_steps=20, tolerance=0.05, slots=16)
    result = synthesize_shard(teacher, inputs, settings)
    early = result.steps < 20
    assert 10 < int(early.sum()) < 40
    assert float(result.fit[early].max()) <= 0.05
    left_at_the_end = result.steps == 20
    assert int(result.steps.max()) == 20
    assert float(result.fit[left_at_the_end].max()) > 0.05
    for row in (result.steps > 0).logical_and(early).nonzero().flatten().tolist()[:6]:  # and not a step later
        one = slice(row, row + 1)
        steps = int(result.steps[row]) - 1
        before = plain_loop(teacher, inputs, settings_for(max_steps=steps), one)
        assert float(divergence(teacher, before, inputs.targets[one], 1.0)) > 0.05


def test_images_that_cannot_fit_use_all_steps_or_their_patience() -> None:
    """One-hot targets cannot be met at temperature 20."""
    teacher = small_teacher()
    inputs = inputs_for(10, targets=torch.eye(5).repeat(2, 1))
    stubborn = synthesize_shard(teacher, inputs, settings_for(max_steps=80, tolerance=1e-4, learning_rate=0.3))
    assert stubborn.steps.tolist() == [80] * 10
    patient = settings_for(max_steps=80, tolerance=1e-4, learning_rate=0.3, patience=5)
    given_up = synthesize_shard(teacher, inputs, patient)
    assert int(given_up.steps.max()) < 80
    assert int(given_up.steps.min()) >= 5
    assert_results_belong_together(teacher, inputs, given_up)


def test_patience_by_a_naive_rule() -> None:
    teacher, inputs = small_teacher(), inputs_for(6)
    settings = settings_for(max_steps=50, learning_rate=0.2, patience=4)
    result = synthesize_shard(teacher, inputs, settings)
    for row in range(6):
        one = slice(row, row + 1)
        best, best_step, left = math.inf, 0, 50
        for step in range(51):
            images = (
                plain_loop(teacher, inputs, settings_for(max_steps=step, learning_rate=0.2), one)
                if step
                else inputs.starts[one]
            )
            fit = float(divergence(teacher, images, inputs.targets[one]))
            if fit < 0.99 * best:
                best, best_step = fit, step
            if step - best_step >= 4:
                left = step
                break
        assert int(result.steps[row]) == left


def test_on_finished_counts_every_image_once() -> None:
    counts: list[int] = []
    synthesize_shard(
        small_teacher(),
        inputs_for(33, temperatures=torch.ones(33, 1)),
        settings_for(slots=7, tolerance=0.1),
        counts.append,
    )
    assert sum(counts) == 33
    assert all(counts)


def test_step_limit_of_each_image() -> None:
    teacher, limits = small_teacher(), torch.tensor([3.0, 11, 1, 7, 2, 2, 15, 9, 4])
    inputs = inputs_for(9, limits=limits)
    result = engine(teacher, inputs, settings_for(max_steps=(1, 15), slots=4))
    assert result.steps.tolist() == limits.tolist()
    for row, limit in enumerate(limits.tolist()):
        alone = plain_loop(teacher, inputs, settings_for(max_steps=int(limit)), slice(row, row + 1))
        torch.testing.assert_close(result.images[row : row + 1], alone, rtol=0, atol=1e-5)
    assert_results_belong_together(teacher, inputs, result)


def test_step_limits_and_temperatures_of_a_store_are_drawn_between_two_numbers(tmp_path) -> None:
    store = make_store(tmp_path / "s", size=200, shard=200, max_steps=(2, 9), temperature=(1.0, 20.0))
    steps = store.read(0).steps.tolist()
    assert set(steps) <= set(range(2, 10))
    assert len(set(steps)) >= 6
    shorter = sum(step <= 4 for step in steps) / len(steps)  # log-uniform: ln(4.5 / 2) / ln(9 / 2) = 0.54
    assert 0.4 < shorter < 0.68


# The authors' schedule.


@pytest.mark.parametrize(("rescale", "warm"), [(True, True), (True, False), (False, True)])
def test_authors_schedule_by_a_naive_loop(rescale: bool, warm: bool) -> None:
    """Batches of 4; the whole batch rescaled before every step but the last; warm starts keep images and Adam."""
    teacher, inputs, steps, batch = small_teacher(), inputs_for(10), 6, 4
    settings = settings_for(
        max_steps=steps, slots=batch, range="rescale" if rescale else "clamp", warm_start=warm, learning_rate=0.01
    )
    result = synthesize_shard(teacher, inputs, settings)
    kept, images, adam = [], None, None
    for first in range(0, 10, batch):
        rows = slice(first, min(first + batch, 10))
        count = rows.stop - rows.start
        if images is None or not warm:
            images = inputs.starts[rows].clone().requires_grad_(True)
            adam = torch.optim.Adam([images], lr=0.01)
        elif count < batch:  # the last batch is smaller: the first slots go on
            state = {key: value[:count] if value.ndim else value for key, value in adam.state[images].items()}
            images = images.detach()[:count].clone().requires_grad_(True)
            adam = torch.optim.Adam([images], lr=0.01)
            adam.state[images] = state
        for step in range(steps):
            if rescale and step < steps - 1:
                with torch.no_grad():
                    low, high = images.min().clone(), images.max().clone()
                    images.sub_(low).div_(high - low)
            adam.zero_grad()
            cross_entropy(teacher, images, inputs.targets[rows], TEMPERATURE).sum().backward()
            adam.step()
            if not rescale:
                with torch.no_grad():
                    images.clamp_(0, 1)
        kept.append(images.detach().clone())
    torch.testing.assert_close(result.images, torch.cat(kept), rtol=0, atol=2e-5)
    assert result.steps.tolist() == [steps] * 10
    assert_results_belong_together(teacher, inputs, result)


def test_free_range_leaves_the_value_range_and_clamp_does_not() -> None:
    teacher, inputs = small_teacher(), inputs_for(10)
    free = synthesize_shard(teacher, inputs, settings_for(range="free", learning_rate=0.3))
    torch.testing.assert_close(
        free.images,
        plain_loop(teacher, inputs, settings_for(learning_rate=0.3), slice(0, 10), clamp=False),
        rtol=0,
        atol=1e-4,
    )
    assert float(free.images.max()) > 1.5
    clamped = synthesize_shard(teacher, inputs, settings_for(learning_rate=0.3))
    assert float(clamped.images.min()) >= 0
    assert float(clamped.images.max()) <= 1


# Divergence.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"tolerance": 0.01}, {"patience": 3}])
def test_a_teacher_that_turns_nan_never_yields_an_impression(value: float, options: dict[str, Any]) -> None:
    teacher = small_teacher()
    with torch.no_grad():
        teacher.model.hidden.weight[0, 0] = value
        teacher.model.hidden.weight[0, 1] = -value
    with pytest.raises(UserError, match=r"not finite.*learning_rate"):
        synthesize_shard(teacher, inputs_for(8), settings_for(**options))


def test_a_huge_learning_rate_never_stores_what_is_not_finite(tmp_path) -> None:
    clamped = make_store(tmp_path / "clamped", size=40, learning_rate=1e9)
    assert torch.isfinite(clamped.images()).all()
    with pytest.raises(UserError, match="not finite"):
        make_store(tmp_path / "free", size=40, learning_rate=1e9, range="free")
    assert not list((tmp_path / "free").glob("*.safetensors"))


# Settings.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": (3.0, 2.0)}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"shard": -5}, "shard must be at least 1"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"tolerance": float("nan")}, "tolerance must be positive"),
        ({"patience": -1}, "patience must not be negative"),
        ({"start": "noise"}, "start is one of .*not 'noise'"),
        ({"range": "clip"}, "range is one of .*not 'clip'"),
        ({"hold": 1.5}, "hold must lie in"),
        ({"total_variation": (1.0, 0.5)}, "total_variation is two weights"),
        ({"total_variation": (0.0, 0.5)}, "total_variation is two weights"),
        ({"max_steps": (9, 2)}, "max_steps must be at least 1"),
        ({"range": "rescale", "tolerance": 0.1}, "none may leave early.*tolerance: null, patience: 0"),
        ({"warm_start": True, "patience": 5}, "none may leave early.*tolerance: null, patience: 0"),
        ({"warm_start": True, "max_steps": (2, 9)}, "none may leave early.*one number of max_steps"),
    ],
)
def test_settings_outside_their_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthesisSettings(**arguments)


# Starts.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [SMALL, InputSpec((3, 32, 20), low=-2, high=0.5)])
def test_starts_lie_in_the_range_and_depend_on_the_generator_alone(kind: str, spec: InputSpec) -> None:
    images, free = start_images(kind, 60, spec, random(4))
    again, free_again = start_images(kind, 60, spec, random(4))
    other, _ = start_images(kind, 60, spec, random(5))
    assert images.shape == (60, *spec.shape)
    assert torch.isfinite(images).all()
    assert float(images.min()) >= spec.low - 1e-6
    assert float(images.max()) <= spec.high + 1e-6
    assert torch.equal(images, again)
    assert torch.equal(images, other) == (kind == "black")
    if free is not None:
        assert free.shape == (60, 1, *spec.shape[1:])
        assert set(free.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(free, free_again)
    if kind == "black":
        assert images.unique().tolist() == [spec.low]
    else:
        assert float(images.flatten(1).mean(1).std()) > (0 if kind == "uniform" else 0.05) * (spec.high - spec.low)


def test_uniform_starts_are_uniform() -> None:
    from scipy import stats

    images, free = start_images("uniform", 40, InputSpec((1, 32, 32), low=-1, high=1), random(0))
    assert free is None
    assert stats.kstest(images.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4


@pytest.mark.parametrize("hold", [0.0, 1.0])
def test_hold_is_a_probability(hold: float) -> None:
    _, free = start_images("shapes", 100, InputSpec((1, 32, 32)), random(0), hold=hold)
    assert free is not None
    held = (free == 0).flatten(1).any(1).float().mean()
    assert float(held) == 0 if hold == 0 else float(held) > 0.8


# What a teacher's BatchNorm layers remember.


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, TEMPERATURE), (0.3, TEMPERATURE), (0.3, 1.5)])
def test_images_come_near_what_batch_norms_remember(weight: float, temperature: float) -> None:
    """The weight is beside the divergence at every temperature; each image has its share of the distance."""
    teacher, settings = small_teacher(), settings_for(batch_statistics=weight)
    inputs = inputs_for(6, temperatures=torch.full((6, 1), temperature))
    norm = teacher.model.get_submodule("norm")
    images = inputs.starts.clone().requires_grad_(True)
    adam = torch.optim.Adam([images], lr=settings.learning_rate)
    for _ in range(settings.max_steps):  # type: ignore[arg-type]
        passing = teacher.model.get_submodule("conv")(images)
        found, spread = passing.mean((0, 2, 3)), passing.var((0, 2, 3), unbiased=False)
        distance = (found - norm.running_mean).square().sum().sqrt() + (spread - norm.running_var).square().sum().sqrt()
        value = cross_entropy(teacher, images, inputs.targets, temperature).sum() + len(images) * weight * distance
        (images.grad,) = torch.autograd.grad(value, images)
        adam.step()
        images.data.clamp_(0, 1)
    made = synthesize_shard(teacher, inputs, settings)
    torch.testing.assert_close(made.images, images.detach(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("slots", [6, 3, 9])
def test_finished_images_stay_in_the_batch_statistics(slots: int) -> None:
    """Fresh images take the places of those that left; who leaves without a successor stays as they were."""
    teacher, settings = small_teacher(), settings_for(batch_statistics=0.3, max_steps=(1, 99), slots=slots)
    limits = torch.tensor([2.0, 5, 9, 9, 3, 12])
    inputs = inputs_for(6, limits=limits)
    norm = teacher.model.get_submodule("norm")
    rows = [image.clone().requires_grad_(True) for image in inputs.starts]
    adams = [torch.optim.Adam([row], lr=settings.learning_rate) for row in rows]
    taken = [0] * 6
    crowd, waiting = list(range(min(slots, 6))), list(range(min(slots, 6), 6))
    while any(taken[index] < limits[index] for index in crowd):
        members = torch.stack([rows[index] for index in crowd])
        passing = teacher.model.get_submodule("conv")(members)
        found, spread = passing.mean((0, 2, 3)), passing.var((0, 2, 3), unbiased=False)
        distance = (found - norm.running_mean).square().sum().sqrt() + (spread - norm.running_var).square().sum().sqrt()
        value = cross_entropy(teacher, members, inputs.targets[crowd], TEMPERATURE).sum() + len(crowd) * 0.3 * distance
        gradients = torch.autograd.grad(value, [rows[index] for index in crowd])
        for place, (index, gradient) in enumerate(zip(list(crowd), gradients, strict=True)):
            if taken[index] < limits[index]:
                rows[index].grad = gradient
                adams[index].step()
                rows[index].data.clamp_(0, 1)
                taken[index] += 1
            elif waiting:
                crowd[place] = waiting.pop(0)
    made = synthesize_shard(teacher, inputs, settings)
    assert made.steps.tolist() == limits.tolist()
    torch.testing.assert_close(made.images, torch.stack(rows).detach(), atol=2e-4, rtol=0)


def test_a_teacher_without_batch_norms_knows_no_statistics(tmp_path: Path) -> None:
    stores, teacher = [], Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), SMALL)
    for weight in (0.0, 1.0):
        stores.append(
            synthesize(
                teacher,
                ZskdTargets(teacher, ZskdSettings()),
                settings_for(batch_statistics=weight),
                size=6,
                seed=0,
                folder=tmp_path / str(weight),
                quiet=True,
            )
        )
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[1].manifest["identity"]["synthesis"]["batch_statistics"] == 0.0


def test_the_option_stands_in_the_identity_where_it_has_a_part(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / str(weight), batch_statistics=weight) for weight in (0.0, 1.0)]
    assert [store.manifest["identity"]["synthesis"]["batch_statistics"] for store in stores] == [0.0, 1.0]
    assert stores[0].fingerprint != stores[1].fingerprint


def test_a_negative_weight_of_statistics() -> None:
    with pytest.raises(ValueError, match=r"batch_statistics must not be negative, not -1.0"):
        SynthesisSettings(batch_statistics=-1.0)
