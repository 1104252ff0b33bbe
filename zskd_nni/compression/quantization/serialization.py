"""A quantized network on disk: the network like any other, its scales as safetensors, the rest as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from zskd_nni.compression.quantization.calibration import Calibration
from zskd_nni.compression.quantization.nni_quantizer import with_fuse_names
from zskd_nni.compression.quantization.quantize import QuantizedNetwork
from zskd_nni.models.serialization import load_network
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, sha256_of_file
from zskd_nni.runtime.tensors import load_tensors, save_tensors


def calibration_file(description: Path) -> Path:
    """The safetensors file of the scales beside a network's description."""
    return description.with_suffix(".calibration.safetensors")


def save_calibration(quantized: QuantizedNetwork, description: Path) -> dict[str, Any]:
    """Write the scales; returns what the network's description must hold for :func:`load_quantization`."""
    tensors: dict[str, Tensor] = {}
    plain: Calibration = {}
    for path, targets in quantized.calibration.items():
        for target, entry in targets.items():
            saved = plain.setdefault(path, {}).setdefault(target, dict(entry))
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    name = f"{path}:{target}:{key}"
                    tensors[name] = value
                    saved[key] = {"tensor": name}
    file = calibration_file(description)
    save_tensors(file, tensors)
    return {
        "quantizer": quantized.quantizer,
        "config_list": quantized.config_list,
        "calibration": plain,
        "calibration_sha256": sha256_of_file(file),
    }


def load_quantization(description: Path) -> QuantizedNetwork:
    """The quantized network that :func:`save_calibration` and ``save_network`` wrote.

    Raises:
        UserError: a file is missing, damaged or of another kind.
    """
    network = load_network(description)
    saved = read_json(description).get("quantization")
    file = calibration_file(description)
    tensors, _ = load_tensors(file)
    try:
        if sha256_of_file(file) != saved["calibration_sha256"]:
            raise UserError(f"{file} is not the file that {description.name} describes: its checksum differs.")
        calibration: Calibration = {
            path: {
                target: {
                    key: tensors[value["tensor"]] if isinstance(value, dict) else value for key, value in entry.items()
                }
                for target, entry in targets.items()
            }
            for path, targets in saved["calibration"].items()
        }
        config_list = with_fuse_names(network, saved["config_list"])
        return QuantizedNetwork(network, saved["quantizer"], config_list, calibration)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{description} holds no whole quantization ({error}); remove it to make it again.") from error
