"""Accuracy is only measured on labels that are classes of the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.runtime.errors import UserError


def test_a_folder_without_class_folders_has_no_labels(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="without a class"):
        load_images(str(tmp_path)).require_labels(10)


def test_labels_beyond_the_classes_are_refused():
    data = LabelledImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 3]), "mine")
    data.require_labels(4)
    with pytest.raises(UserError, match="a class 3, the network knows 3"):
        data.require_labels(3)
