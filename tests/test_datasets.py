"""Reading labelled images: what is right is read exactly, what is wrong is one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA, REQUIRE_DATA, SMALL, require_real_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zskd_nni.data.datasets import LabelledImages, data_root, fit_shape, load_images
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.inference import logits_on


def write_npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez_compressed(path, **arrays)
    return str(path)


def grey(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def test_digits_are_split_every_fifth() -> None:
    from sklearn.datasets import load_digits

    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    digits = load_digits()
    held_out = np.arange(1797) % 5 == 0
    np.testing.assert_array_equal(test.labels.numpy(), digits.target[held_out])
    np.testing.assert_array_equal(train.labels.numpy(), digits.target[~held_out])
    np.testing.assert_allclose(test.images[:, 0].numpy(), digits.images[held_out] * 255 / 16, atol=0.5)
    assert test.images.dtype == torch.uint8
    assert test.images.shape == (360, 1, 8, 8)
    assert len(set(test.labels.tolist())) == 10


def test_npz_round_trip(tmp_path: Path) -> None:
    images, labels = grey(), np.array([3, 1, 0, 2])
    data = load_images(write_npz(tmp_path / "set.npz", images=images, labels=labels))
    np.testing.assert_array_equal(data.images[:, 0].numpy(), images)
    assert data.labels.tolist() == labels.tolist()
    assert data.name == "set"
    colour = np.random.default_rng(1).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    data = load_images(write_npz(tmp_path / "colour.npz", images=colour, labels=labels.astype(np.uint8)))
    assert data.images.shape == (4, 3, 6, 5)
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), colour)
    assert data.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": grey(), "labels": np.arange(4)}, "no array 'images'"),
        ({"images": grey() / 100, "labels": np.arange(4)}, r"float64 from .*belong in \[0, 1\]"),
        ({"images": grey() * np.nan, "labels": np.arange(4)}, "from nan to nan, which are no pixels"),
        ({"images": grey() * 0.0 - 1, "labels": np.arange(4)}, "from -1 to -1, which are no pixels"),
        ({"images": grey(), "labels": np.arange(3)}, r"one integer label each.*\(3,\)"),
        ({"images": grey(), "labels": np.zeros((4, 1), int)}, r"one integer label each.*\(4, 1\)"),
        ({"images": grey(), "labels": np.eye(4)}, "one integer label each"),
        ({"images": grey(), "labels": np.array(list("abcd"))}, "one integer label each"),
        ({"images": grey(), "labels": np.zeros(4)}, "one integer label each.*float64"),
        ({"images": grey()[0], "labels": np.arange(8)}, r"of shape \(N, H, W\)"),
        ({"images": grey(0), "labels": np.zeros(0, int)}, "one integer label each"),
        ({"images": grey(), "labels": np.array([{}] * 4)}, "pickle"),
        ({"images": grey()[:, None], "labels": np.arange(4)}, r"channels first.*belong last"),
    ],
)
def test_npz_that_hold_something_else(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_images(write_npz(tmp_path / "set.npz", **arrays))


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=grey(), labels=np.arange(4))
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", npy_bytes(), npz_bytes()[:-40], npz_bytes()[:60]])
def test_broken_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"set\.npz"):
        load_images(str(tmp_path / "set.npz"))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_an_npz_are_read_or_refused(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(npz_bytes())
    for place, value in flips:
        content[place % len(content)] ^= value
    (tmp_path / "set.npz").write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(load_images(str(tmp_path / "set.npz")), LabelledImages)


def save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_folder_of_images(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    names = ["b/1.png", "a/2.PNG", "a/1.png", "c/x.bmp", "b/0.png"]
    for name, picture in zip(names, pictures, strict=True):
        save_png(tmp_path / "set" / name, picture)
    (tmp_path / "set/a/notes.txt").write_text("not an image")
    data = load_images(str(tmp_path / "set"))
    assert data.labels.tolist() == [0, 0, 1, 1, 2]
    expected = pictures[[2, 1, 4, 0, 3]]
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), expected)
    assert data.name == "set"


def test_folders_that_appear_by_themselves_are_no_classes_and_empty_ones_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_png(tmp_path / name / "1.png", grey()[0])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    save_png(tmp_path / "__MACOSX" / "1.png", grey()[0])
    assert load_images(str(tmp_path)).labels.tolist() == [0, 1]
    (tmp_path / "ab").mkdir()
    with pytest.raises(UserError, match="ab holds no images, and as a class it would shift"):
        load_images(str(tmp_path))


def test_sixteen_bits_of_grey_are_scaled_and_thirty_two_refused(tmp_path: Path) -> None:
    picture = grey()[0].astype(np.uint16) * 257
    save_png(tmp_path / "deep" / "1.png", picture)
    np.testing.assert_array_equal(load_images(str(tmp_path / "deep")).images[0, 2].numpy(), grey()[0])
    save_png(tmp_path / "float" / "1.tiff", picture.astype(np.float32))
    with pytest.raises(UserError, match=r"1\.tiff has pixels of 32 bits"):
        load_images(str(tmp_path / "float"))


def test_folder_without_classes_and_in_grey(tmp_path: Path) -> None:
    for index in range(3):
        save_png(tmp_path / f"{index}.png", grey(3)[index])
    data = load_images(str(tmp_path))
    assert data.images.shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(data.images[:, 1].numpy(), grey(3))
    assert data.labels.tolist() == [-1, -1, -1]


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        load_images(str(tmp_path / "empty"))
    save_png(tmp_path / "mixed/1.png", grey()[0])
    save_png(tmp_path / "mixed/2.png", grey()[0][:4])
    with pytest.raises(UserError, match="differ in size"):
        load_images(str(tmp_path / "mixed"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UserError, match=r"1\.png cannot be read"):
        load_images(str(tmp_path / "broken"))


def test_errors_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA, raising=False)
    with pytest.raises(UserError, match="train or test, not 'val'"):
        load_images("digits", "val")
    with pytest.raises(UserError, match=r"no data set 'mnits': name one of digits, mnist"):
        load_images("mnits")
    with pytest.raises(UserError, match="There is no file"):
        load_images(str(tmp_path / "absent.npz"))
    with pytest.raises(UserError, match=r"--data-root DIR or set ZSKD_NNI_DATA"):
        load_images("mnist")
    with pytest.raises(UserError, match=r"mnist is not in .*mnist-test\.npz.*--download"):
        load_images("mnist", root=tmp_path)
    with pytest.raises(UserError, match="cifar10 is not in"):
        load_images("cifar10", root=tmp_path / "absent")
    assert list(tmp_path.iterdir()) == [], "nothing is fetched unasked"


def test_root_comes_from_the_variable_and_npz_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, str(tmp_path))
    assert data_root() == tmp_path
    assert data_root("elsewhere") == Path("elsewhere")
    write_npz(tmp_path / "mnist-test.npz", images=grey(), labels=np.arange(4))
    data = load_images("mnist")
    assert (data.name, len(data)) == ("mnist", 4)
    with pytest.raises(UserError, match="mnist is not in"):
        load_images("mnist", "train")


def test_svhn_in_torchvisions_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matlab's order of axes, and class 10 for the digit 0. A small file stands in; only its checksum is replaced."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    file = tmp_path / "test_32x32.mat"
    savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [9], [2], [10]], dtype=np.uint8)})
    url, name, _ = SVHN.split_list["test"]
    monkeypatch.setitem(SVHN.split_list, "test", [url, name, hashlib.md5(file.read_bytes()).hexdigest()])
    data = load_images("svhn", "test", tmp_path)
    assert (data.name, data.labels.tolist()) == ("svhn", [1, 0, 9, 2, 0])
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), images)
    with pytest.raises(UserError, match=r"svhn is not in .*svhn-train\.npz"):
        load_images("svhn", "train", tmp_path)


def test_fit_shape() -> None:
    small = torch.rand(2, 1, 28, 28)
    padded = fit_shape(small, (1, 32, 32))
    assert torch.equal(padded[:, :, 2:-2, 2:-2], small)
    assert float(padded.sum()) == pytest.approx(float(small.sum()), rel=1e-6)
    assert torch.equal(fit_shape(small, (1, 28, 28)), small)
    assert torch.equal(fit_shape(small, (3, 28, 28)), small.expand(-1, 3, -1, -1))
    colour = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(fit_shape(colour, (1, 8, 8)), colour.mean(1, keepdim=True))
    constant = fit_shape(torch.full((1, 1, 8, 8), 0.3), (1, 32, 32))
    torch.testing.assert_close(constant, torch.full((1, 1, 32, 32), 0.3))
    twelve = torch.rand(2, 12, 8, 8)
    assert torch.equal(fit_shape(twelve, (12, 8, 8)), twelve)
    with pytest.raises(UserError, match="have 12 channels of 8x8 pixels, the network takes 3 of 8x8"):
        fit_shape(twelve, (3, 8, 8))
    with pytest.raises(UserError, match="have 3 channels of 8x8 pixels, the network takes 12"):
        fit_shape(colour, (12, 8, 8))


def test_pixels_in_the_teachers_range() -> None:
    data = LabelledImages(torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1), torch.zeros(3).long(), "x")
    pixels = data.pixels(slice(None), InputSpec((1, 1, 1), low=-1, high=3))
    torch.testing.assert_close(pixels.flatten(), torch.tensor([-1.0, 3.0, -0.2]))
    assert data.images.flatten().tolist() == [0, 255, 51]
    assert data.subset(slice(1, 2), "one").labels.tolist() == [0]


def test_logits_in_batches() -> None:
    data = LabelledImages(torch.from_numpy(grey(23))[:, None], torch.zeros(23).long(), "x")

    def network(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :5]

    whole = logits_on(network, data, SMALL)
    assert torch.equal(whole, logits_on(network, data, SMALL, batch=4))
    torch.testing.assert_close(whole, torch.from_numpy(grey(23)).flatten(1)[:, :5] / 255)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "shape", "counts"),
    [
        ("mnist", (1, 28, 28), {"train": 60_000, "test": 10_000}),
        ("fashion-mnist", (1, 28, 28), {"train": 60_000, "test": 10_000}),
        ("cifar10", (3, 32, 32), {"train": 50_000, "test": 10_000}),
    ],
)
def test_real_sets(name: str, shape: tuple[int, ...], counts: dict[str, int]) -> None:
    root = require_real_data()
    for split, count in counts.items():
        data = load_images(name, split, root)
        assert data.images.shape == (count, *shape)
        assert data.images.dtype == torch.uint8
        assert int(data.images.max()) == 255
        share = torch.bincount(data.labels, minlength=10) / count
        assert len(share) == 10
        assert 0.08 < float(share.min()) <= float(share.max()) < 0.12


def test_required_data_fail_where_they_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DATA, str(tmp_path / "absent"))
    monkeypatch.delenv(REQUIRE_DATA, raising=False)
    with pytest.raises(pytest.skip.Exception, match=DATA):
        require_real_data()
    monkeypatch.setenv(REQUIRE_DATA, "1")
    with pytest.raises(pytest.fail.Exception, match=REQUIRE_DATA):
        require_real_data()
    monkeypatch.setenv(DATA, str(tmp_path))
    assert require_real_data() == Path(os.environ[DATA])
