"""Which layers attention transfer compares."""

from __future__ import annotations

import pytest
from helpers import small_teacher
from torch import nn

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo.lenet import lenet5, lenet5_half
from zskd_nni.models.zoo.wrn import wrn
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.attention_transfer import attention_pairs


def test_layers_of_the_papers_networks_are_found() -> None:
    spec = InputSpec((3, 32, 32))
    groups = (("group1", "group1"), ("group2", "group2"), ("group3", "group3"))
    assert attention_pairs(wrn(10, 1), Teacher(wrn(16, 2), spec)) == groups
    grey = Teacher(lenet5(), InputSpec((1, 32, 32)))
    found = attention_pairs(lenet5_half(), grey)
    assert found == (("relu1", "relu1"), ("pool1", "pool1"), ("relu2", "relu2"), ("pool2", "pool2"))
    assert attention_pairs(lenet5_half(), grey, "none") == ()


def test_networks_without_a_common_size() -> None:
    other = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    assert attention_pairs(other, small_teacher()) == ()


def test_pairs_that_are_named_are_looked_at() -> None:
    grey = Teacher(lenet5(), InputSpec((1, 32, 32)))
    named = (("pool1", "relu2"),)
    with pytest.raises(UserError, match=r"the teacher's 'pool1' \(14 x 14\) and the student's 'relu2' \(10 x 10\)"):
        attention_pairs(lenet5_half(), grey, named)
    assert attention_pairs(lenet5_half(), grey, (("relu2", "relu2"),)) == (("relu2", "relu2"),)
