"""The trained teachers that come with the package."""

from __future__ import annotations

import pytest
from helpers import require_real_data

from zskd_nni.data.datasets import load_images
from zskd_nni.models.build import build_network, load_into
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo.trained import trained_names, trained_weights, training_record
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.runtime.tensors import load_weights
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy

LEAST = {
    "lenet5-digits": 97.0,
    "lenet5-mnist": 99.2,
    "lenet5-fashion-mnist": 90.6,
    "alexnet-cifar10": 83.0,
    "resnet20-cifar10": 90.0,
    "vgg-cifar10": 85.0,
}


def measured(name: str) -> float:
    about = training_record(name)
    network = build_network(about["network"], about["arguments"])
    load_into(network, load_weights(trained_weights(name)), name)
    spec = InputSpec(**{key: tuple(v) if isinstance(v, list) else v for key, v in about["input"].items()})
    data = load_images(about["data"], "test")
    return accuracy(logits_on(Teacher(network, spec), data, spec), data.labels)


def test_every_teacher_has_its_provenance():
    assert set(LEAST) <= set(trained_names())
    for name in trained_names():
        about = training_record(name)
        assert about["sha256"] == sha256_of_file(trained_weights(name))
        assert about["provenance"]["versions"]["torch"]


def test_digits_teacher():
    assert measured("lenet5-digits") == pytest.approx(training_record("lenet5-digits")["accuracy"], abs=0.3)
    assert measured("lenet5-digits") >= LEAST["lenet5-digits"]


@pytest.mark.real_data
@pytest.mark.parametrize("name", [name for name in LEAST if name != "lenet5-digits"])
def test_teachers_on_real_test_data(name):
    require_real_data()
    assert measured(name) == pytest.approx(training_record(name)["accuracy"], abs=0.05)
    assert measured(name) >= LEAST[name]
