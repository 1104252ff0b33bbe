"""A few of the user's unlabelled images in addition to the synthetic ones: ``transfer.also``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, random
from PIL import Image

from zskd_nni.data.datasets import load_images
from zskd_nni.data.sources import DrawnSource, MixedSource, NoiseSource, StoredSource
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.report_html import remarks
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError

QUICK = (
    *("transfer.size=20", "transfer.held_out=10", "transfer.synthesis.max_steps=2", "distillation.steps=3"),
    *("distillation.batch=10", "compression.pruning.steps=2", "controls=[]"),
)


def folder_of(images: int, where: Path, size: int = 8) -> Path:
    where.mkdir(parents=True)
    for index in range(images):
        grey = torch.randint(0, 256, (size, size), generator=random(index), dtype=torch.uint8)
        Image.fromarray(grey.numpy()).save(where / f"{index}.png")
    return where


@pytest.mark.parametrize(("share", "expected"), [(0.25, 4), (0.01, 1), (0.99, 15)])
def test_a_share_of_every_batch_comes_from_the_further_images(share: float, expected: int) -> None:
    own = torch.stack([torch.full(SMALL.shape, 2.0), torch.full(SMALL.shape, 3.0)])
    drawn = DrawnSource(own, 16, "own")
    mixed = MixedSource(NoiseSource(SMALL, 16), [(drawn, share)])
    batch = mixed.batch(0, random(1))
    further = batch.flatten(1).mean(1) >= 2
    assert batch.shape == (16, *SMALL.shape) and int(further.sum()) == expected
    assert torch.equal(batch, mixed.batch(0, random(1)))
    assert (mixed.size, mixed.batch_size) == (None, 16)
    stored = MixedSource(StoredSource(torch.rand(20, *SMALL.shape), 16, 0, "set"), [(drawn, share)])
    assert stored.size == 20
    other = MixedSource(mixed.source, [(DrawnSource(own, 16, "other"), share)])
    assert len({source.fingerprint for source in (mixed, stored, other)}) == 3


def test_a_recipe_with_own_images_is_not_called_data_free(tmp_path: Path) -> None:
    own = folder_of(3, tmp_path / "own images")
    changes = [*QUICK, f"transfer.also={own}", "transfer.also_share=0.3"]
    report = Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True).compress()
    assert report["data_free"] is False
    assert report["learnt_on"] == f"{own}, 30% of each batch"
    assert not report["learnt_on_what_is_measured"]
    (sentence,) = [each for each in remarks(report) if "NOT data-free" in each]
    assert str(own) in sentence and "upper limit" not in sentence
    without = Run(load_recipe("digits-prune50", QUICK), tmp_path / "other", quiet=True).compress()
    assert without["data_free"] is True
    assert without["history"]["losses"] != report["history"]["losses"]
    changed = load_recipe("digits-prune50", changes)
    (own / "0.png").unlink()
    with pytest.raises(UserError, match="the images have changed since"):
        Run(changed, tmp_path / "out", quiet=True).compress()


def test_a_part_of_every_batch_can_be_procedural_and_new(tmp_path: Path) -> None:
    loaded = load_recipe("digits-prune50", [*QUICK, "transfer.fresh=leaves", "transfer.fresh_share=0.4"])
    run = Run(loaded, tmp_path / "out", quiet=True)
    report = run.compress()
    assert report["data_free"] is True
    source = run.transfer()
    first, again, next_step = (source.batch(step, random(step)) for step in (0, 0, 1))
    assert torch.equal(first, again) and source.size == 20
    stored = {image.float().numpy().tobytes() for image in source.source.images[:]}
    known = [[image.numpy().tobytes() in stored for image in batch] for batch in (first, next_step)]
    assert known == [[True] * 6 + [False] * 4] * 2
    assert not torch.equal(first[6:], next_step[6:])


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("nowhere", "transfer.also: there is no folder .*/nowhere; name a folder of images, or an .npz"),
        ("empty", "transfer.also: .*holds no images"),
        ("colour.npz", "transfer.also: .*holds no array 'images'"),
    ],
)
def test_own_images_that_are_not_there_are_refused(
    value: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "colour.npz", pictures=np.zeros((2, 8, 8, 3), np.uint8))
    loaded = load_recipe("digits-prune50", [*QUICK, f"transfer.also={value}"])
    with pytest.raises(UserError, match=sentence):
        Run(loaded, tmp_path / "out", quiet=True)


def test_an_unknown_kind_of_fresh_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"transfer\.fresh: fresh is one of .*leaves, cutouts, not 'leafs'"):
        load_recipe("digits-prune50", ["transfer.fresh=leafs"])


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_the_share_is_within_nothing_and_all(share: Any) -> None:
    with pytest.raises(UserError, match=r"transfer\.also_share"):
        load_recipe("digits-prune50", ["transfer.also=own", f"transfer.also_share={share}"])


def test_fresh_and_own_images_each_keep_their_share() -> None:
    two, three = (DrawnSource(torch.full((1, *SMALL.shape), value), 16, str(value)) for value in (2.0, 3.0))
    mixed = MixedSource(NoiseSource(SMALL, 16), [(two, 0.25), (three, 0.25)])
    assert mixed.batch(0, random(1)).flatten(1).mean(1)[8:].tolist() == [2.0] * 4 + [3.0] * 4
    few = MixedSource(NoiseSource(SMALL, 3), [(two, 0.6), (three, 0.01)]).batch(0, random(1)).flatten(1).mean(1)
    assert few[0] < 2 and few[1:].tolist() == [2.0, 3.0]
    with pytest.raises(UserError, match="Batches of 2 cannot have images of 3 sources"):
        MixedSource(NoiseSource(SMALL, 2), [(two, 0.25), (three, 0.25)])
    with pytest.raises(UserError, match=r"fresh_share \(0.5\) and also_share \(0.5\) must leave a part"):
        load_recipe("digits-prune50", ["transfer.fresh=leaves", "transfer.also=own", "transfer.also_share=0.5"])


def test_own_images_are_never_those_of_a_data_set_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe("digits-prune50", [*QUICK, "transfer.also=digits"])
    with pytest.raises(UserError, match=r"transfer\.also: there is no folder .*/digits"):
        loaded.own_images()
    folder_of(2, tmp_path / "digits")
    own = loaded.own_images()
    assert own is not None and len(own) == 2


def test_own_images_beside_a_given_store_are_counted_and_may_not_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, own = tmp_path / "given", tmp_path / "own.npz"
    made = load_recipe("digits-prune50", QUICK, seed=3)
    made.transfer_source(made.teacher(), given, quiet=True)
    test = load_images("digits", "test")
    np.savez(own, images=test.images[:3].squeeze(1).numpy())  # without labels, and they are measured on
    loaded = load_recipe("digits-prune50", [*QUICK, f"transfer.also={own}"])
    report = Run(loaded, tmp_path / "out", impressions=given, quiet=True).compress()
    assert report["real_images"] == 3 and report["learnt_on_what_is_measured"]
    assert "25% of each batch is drawn from 3 own images" in capsys.readouterr().err
    sentences = remarks(report)
    assert f"({own}, 25% of each batch), 3 real images." in sentences[0]
    assert any("images that the student was trained on" in sentence for sentence in sentences)
    np.savez(own, images=test.images[3:6].squeeze(1).numpy())
    with pytest.raises(UserError, match="the images have changed since"):
        Run(loaded, tmp_path / "out", impressions=given, quiet=True).compress()
