"""A quantized network on disk: the network like any other, its calibration in a sealed file, the rest as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zskd_nni.compression.quantization.nni_quantizer import with_fuse_names
from zskd_nni.compression.quantization.quantize import QuantizedNetwork
from zskd_nni.models.serialization import load_network
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import is_file, read_json, sha256_of_file
from zskd_nni.runtime.tensors import load_sealed, save_sealed


def calibration_file(description: Path) -> Path:
    """The file of the calibration beside a network's description."""
    return description.with_suffix(".calibration.pt")


def save_calibration(quantized: QuantizedNetwork, description: Path) -> dict[str, Any]:
    """Write the calibration; returns what the network's description must hold for :func:`load_quantization`."""
    file = calibration_file(description)
    save_sealed(file, quantized.calibration)
    return {
        "quantizer": quantized.quantizer,
        "config_list": quantized.config_list,
        "calibration_sha256": sha256_of_file(file),
    }


def load_quantization(description: Path) -> QuantizedNetwork:
    """The quantized network that :func:`save_calibration` and ``save_network`` wrote.

    Raises:
        UserError: a file is missing, damaged or of another kind.
    """
    network = load_network(description)
    saved, file = read_json(description).get("quantization"), calibration_file(description)
    try:
        if is_file(file) and sha256_of_file(file) != saved["calibration_sha256"]:
            raise UserError(f"{file} is not the file that {description.name} describes: its checksum differs.")
        config_list = with_fuse_names(network, saved["config_list"])
        return QuantizedNetwork(network, saved["quantizer"], config_list, load_sealed(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{description} holds no whole quantization ({error}); remove it to make it again.") from error
