"""A quantized student on disk: the network as every other one, its scales as safetensors, the rest as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from zskd_nni.compression.quantization.quantize import Calibration, Quantization, with_fuse_names
from zskd_nni.models.serialization import load_network
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, sha256_of_file
from zskd_nni.runtime.tensors import load_tensors, save_tensors


def calibration_file(description: Path) -> Path:
    """The safetensors file of the scales beside a network's description."""
    return description.with_suffix(".calibration.safetensors")


def save_calibration(quantization: Quantization, description: Path) -> dict[str, Any]:
    """Write the scales; returns what the network's description must hold for :func:`load_quantization`."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for path, targets in quantization.calibration.items():
        for target, entry in targets.items():
            kept = plain.setdefault(path, {}).setdefault(target, {})
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    name = f"{path}:{target}:{key}"
                    tensors[name] = value
                    kept[key] = {"tensor": name}
                else:
                    kept[key] = value
    file = calibration_file(description)
    save_tensors(file, tensors)
    return {
        "quantizer": quantization.quantizer,
        "config_list": quantization.config_list,
        "calibration": plain,
        "calibration_sha256": sha256_of_file(file),
    }


def load_quantization(description: Path) -> Quantization:
    """The quantization that :func:`save_calibration` and ``save_network`` wrote.

    Raises:
        UserError: a file is missing, damaged or not of this kind.
    """
    student = load_network(description)
    kept = read_json(description).get("quantization")
    file = calibration_file(description)
    tensors, _ = load_tensors(file)
    try:
        if sha256_of_file(file) != kept["calibration_sha256"]:
            raise UserError(f"{file} is not the file that {description.name} describes: its checksum differs.")
        calibration: Calibration = {
            path: {
                target: {
                    key: tensors[value["tensor"]] if isinstance(value, dict) else value for key, value in entry.items()
                }
                for target, entry in targets.items()
            }
            for path, targets in kept["calibration"].items()
        }
        config_list = with_fuse_names(student, kept["config_list"])
        return Quantization(student, kept["quantizer"], config_list, calibration)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{description} holds no whole quantization ({error}); remove it to make it again.") from error
