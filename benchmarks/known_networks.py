"""The networks of the second table of ``docs/shrinking.md``, and how each is run: alone, within a time limit.

A name is ``PACKAGE:NETWORK``. Those of ``torchvision``, ``timm`` and ``transformers`` come from these packages.
The others come from clones, which are not part of this repository:

    git clone https://github.com/kuangliu/pytorch-cifar CLONES/pytorch-cifar
    git clone https://github.com/weiaicunzai/pytorch-cifar100 CLONES/pytorch-cifar100
    git clone https://github.com/chenyaofo/pytorch-cifar-models CLONES/pytorch-cifar-models

Left out is ShuffleNet of the first, whose code divides as Python 2 did and cannot be built.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zskd_nni.models.build import build_network

CLONES = ("pytorch-cifar", "pytorch-cifar100", "pytorch-cifar-models")


@dataclass(frozen=True)
class Known:
    """A network of the table.

    Attributes:
        side: of its images, in pixels.
        convolutional: no attention between positions, so that most of its channels can be removed.
        arguments: of its factory; the settings of a network of transformers.
    """

    side: int
    convolutional: bool = True
    arguments: tuple[tuple[str, Any], ...] = ()


def _named(package: str, names: str, side: int = 64, convolutional: bool = True) -> dict[str, Known]:
    return {f"{package}:{name}": Known(side, convolutional) for name in names.split()}


def _settings(side: int, convolutional: bool = True, **arguments: Any) -> Known:
    return Known(side, convolutional, tuple(arguments.items()))


_SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}

KNOWN: dict[str, Known] = {
    **_named(
        "torchvision",
        "alexnet vgg11 vgg11_bn vgg16_bn resnet18 resnet34 resnet50 wide_resnet50_2 resnext50_32x4d squeezenet1_0 "
        "squeezenet1_1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5 "
        "shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf googlenet densenet121",
    ),
    **_named("torchvision", "convnext_tiny"),
    **_named("torchvision", "inception_v3", 96),
    **_named("torchvision", "swin_t swin_v2_t", 64, False),
    "torchvision:vit_b_16": _settings(32, False, image_size=32),
    **_named("torchvision", "maxvit_t", 224, False),
    **_named(
        "timm",
        "resnet10t resnet18d resnet14t resnetblur18 seresnet18 skresnet18 ecaresnet26t resnest14d res2net50_14w_8s "
        "gernet_s repvgg_a0 mobileone_s0 mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv3_large_075 "
        "mobilenetv4_conv_small_035 tinynet_e lcnet_035 fbnetc_100 spnasnet_100 mnasnet_small mixnet_s semnasnet_075 "
        "efficientnet_lite0 efficientnet_es tf_efficientnet_b0 tf_mobilenetv3_small_075 ghostnet_050 hardcorenas_a "
        "regnetx_002 regnety_002 regnetz_005 rexnet_100 dla46_c dla34 cspresnet50 cspdarknet53 darknet17 "
        "ese_vovnet19b_dw selecsls42 hgnet_tiny hrnet_w18_small xception41 dpn48b nf_resnet26 nf_regnet_b0 "
        "convnext_atto convnextv2_atto starnet_s1 repghostnet_050 densenet121",
    ),
    **_named("timm", "poolformer_s12 edgenext_xx_small mobilevit_xxs fastvit_t8", 64, False),
    "timm:vit_tiny_patch16_224": _settings(64, False, img_size=64),
    "timm:deit_tiny_patch16_224": _settings(64, False, img_size=64),
    "timm:resmlp_12_224": _settings(64, False, img_size=64),
    "transformers:resnet": _settings(64, layer_type="basic", embedding_size=16, **_STAGES),
    "transformers:regnet": _settings(64, embedding_size=16, groups_width=16, **_STAGES),
    "transformers:convnext": _settings(64, **(_STAGES | {"depths": [2, 2, 2, 2]})),
    "transformers:convnextv2": _settings(64, **(_STAGES | {"depths": [2, 2, 2, 2]})),
    "transformers:mobilenet_v1": _settings(64, depth_multiplier=0.25),
    "transformers:mobilenet_v2": _settings(64, depth_multiplier=0.35),
    "transformers:efficientnet": _settings(64, width_coefficient=0.5, depth_coefficient=0.3, hidden_dim=640),
    "transformers:bit": _settings(64, embedding_size=32, depths=[1, 1, 1, 1], hidden_sizes=[128, 128, 256, 256]),
    "transformers:poolformer": _settings(64, False, **_STAGES),
    "transformers:vit": _settings(64, False, image_size=64, **_SMALL),
    "transformers:deit": _settings(
        64, False, image_size=64, architectures=["DeiTForImageClassification"], **_SMALL
    ),
    "transformers:dinov2": _settings(56, False, image_size=56, **(_SMALL | {"mlp_ratio": 2})),
    "transformers:swin": _settings(
        64, False, image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "transformers:segformer": _settings(64, False, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64]),
    "transformers:mobilevit": _settings(64, False, image_size=64),
    "transformers:levit": _settings(
        64, False, architectures=["LevitForImageClassification"], image_size=64, hidden_sizes=[32, 48, 64],
        depths=[1, 1, 1]
    ),
    **_named(
        "pytorch-cifar",
        "lenet.LeNet vgg.VGG/VGG11 resnet.ResNet18 preact_resnet.PreActResNet18 googlenet.GoogLeNet "
        "densenet.densenet_cifar resnext.ResNeXt29_2x64d mobilenet.MobileNet mobilenetv2.MobileNetV2 dpn.DPN26 "
        "senet.SENet18 shufflenetv2.ShuffleNetV2/1 efficientnet.EfficientNetB0 "
        "regnet.RegNetX_200MF dla_simple.SimpleDLA dla.DLA pnasnet.PNASNetA",
        32,
    ),
    **_named(
        "pytorch-cifar100",
        "vgg.vgg11_bn resnet.resnet18 preactresnet.preactresnet18 squeezenet.squeezenet mobilenet.mobilenet "
        "mobilenetv2.mobilenetv2 shufflenet.shufflenet shufflenetv2.shufflenetv2 senet.seresnet18 resnext.resnext50 "
        "xception.xception googlenet.googlenet rir.resnet_in_resnet stochasticdepth.stochastic_depth_resnet18 "
        "wideresidual.wideresnet/16/4 attention.attention56 inceptionv3.inceptionv3 densenet.densenet121 nasnet.nasnet",
        32,
    ),
    **_named(
        "pytorch-cifar-models",
        "cifar10_resnet20 cifar10_vgg11_bn cifar10_mobilenetv2_x0_5 cifar10_shufflenetv2_x0_5 cifar10_repvgg_a0",
        32,
    ),
    **_named("pytorch-cifar-models", "cifar10_vit_b32", 224, False),
}  # fmt: skip

# Where no channel of a convolution can be removed alone, because all are normalised together: the config names Linear
# layers too.
LINEAR = {
    "torchvision:convnext_tiny", "torchvision:swin_t", "torchvision:swin_v2_t", "torchvision:vit_b_16",
    "timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224", "timm:resmlp_12_224", "transformers:convnext",
    "transformers:convnextv2", "transformers:vit", "transformers:deit", "transformers:dinov2", "transformers:swin",
    "transformers:segformer", "transformers:mobilevit", "transformers:levit", "pytorch-cifar-models:cifar10_vit_b32",
}  # fmt: skip


def build(name: str, clones: Path | None) -> nn.Module:
    """A network of the table in ``eval()`` mode, with random weights and 10 classes (a clone's own number)."""
    package, _, network = name.partition(":")
    arguments = dict(KNOWN[name].arguments)
    torch.manual_seed(0)
    if package == "transformers":
        return randomised(_of_transformers(network, arguments)).eval()
    if package not in CLONES:
        return randomised(build_network(name, {"num_classes": 10, **arguments}, None)).eval()
    assert clones is not None
    sys.path.insert(0, str(clones / package))
    if package == "pytorch-cifar-models":
        factory = getattr(importlib.import_module("pytorch_cifar_models"), network)
        return randomised(factory()).eval()
    path, *given = network.split("/")
    module, _, function = path.partition(".")
    values = [int(value) if value.isdigit() else value for value in given]
    return randomised(getattr(importlib.import_module(f"models.{module}"), function)(*values)).eval()


def _of_transformers(kind: str, settings: dict[str, Any]) -> nn.Module:
    """By way of a folder, as users have it."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(kind, num_labels=10, **settings).save_pretrained(folder)
        return build_network(f"transformers:{folder}", {}, None)


def randomised(network: nn.Module) -> nn.Module:
    """Give BatchNorm random statistics, scales and shifts, so that a channel left behind shows in the logits."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return network


def alone(measure: Callable[[str, Path | None], dict[str, Any]], name: str, clones: Path | None, limit: float) -> Any:
    """``measure(name, clones)`` in a process of its own, which is ended after ``limit`` seconds of one core.

    On a busy machine the clock runs much faster than that.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        # Not a fork: PyTorch's threads do not survive one.
        given = (measure, name, clones, file, limit, torch.get_num_threads())
        process = multiprocessing.get_context("spawn").Process(target=_run, args=given)
        process.start()
        process.join(30 * limit)
        if process.is_alive():
            process.kill()
            process.join()
        if file.exists():
            return json.loads(file.read_text())
        late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        why_not = f"not done within {limit:.0f} seconds" if late else f"its process ended with {process.exitcode}"
        return {"network": name, "why_not": why_not, "seconds": limit if late else 0.0}


def _run(
    measure: Callable[[str, Path | None], dict[str, Any]],
    name: str,
    clones: Path | None,
    file: Path,
    limit: float,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_CPU, (round(limit), round(limit) + 5))
    with redirect_stdout(sys.stderr):
        try:
            row = measure(name, clones)
        except Exception as error:
            traceback.print_exc()
            row = {"network": name, "why_not": f"{type(error).__name__}: {error}", "seconds": 0.0, "traceback": True}
    file.write_text(json.dumps(row))
