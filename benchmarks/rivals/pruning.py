"""Half of the channels gone without any training: by magnitude, with BatchNorm re-estimated on noise, by folding."""

from __future__ import annotations

import copy

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from rivals.pairs import Maker, Pair, teacher_of
from zskd_nni.compression.pruning.prune import prune
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.recipes.compression_config import CompressionRun, PruningConfig

SHARE = 0.5
NOISE_BATCHES, NOISE_BATCH = 20, 100


def nni_alone(pair: Pair, seed: int) -> nn.Module:
    """NNI's L1NormPruner, then its ModelSpeedup, without any step. Needs no images."""
    teacher = teacher_of(pair)
    config = PruningConfig([{"op_names": list(pair.convolutions), "sparse_ratio": SHARE}], steps=0)
    images = NoiseSource(teacher.spec, NOISE_BATCH)  # which nothing reads: the norms are those of weights
    return prune(teacher.student(), config, teacher, images, run=CompressionRun(seed=seed, quiet=True)).network


def torch_pruning(pair: Pair, seed: int) -> nn.Module:
    """Torch-Pruning's magnitude pruner with its default importance (groups, L2), from its package."""
    import torch_pruning as package

    teacher = teacher_of(pair)
    network = teacher.student()
    others = [module for module in network.modules() if isinstance(module, nn.Linear)]
    pruner = package.pruner.MagnitudePruner(
        network,
        teacher.spec.normalise(teacher.spec.midpoint(2)),
        importance=package.importance.GroupMagnitudeImportance(),
        pruning_ratio=SHARE,
        ignored_layers=others,
    )
    pruner.step()
    return network


def batch_norm_on_noise(pair: Pair, seed: int) -> nn.Module:
    """The network of NNI alone, with the statistics of its BatchNorms re-estimated on uniform noise."""
    network, spec = nni_alone(pair, seed), teacher_of(pair).spec
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad(), fast_response_norms(network):
        for batch in range(NOISE_BATCHES):
            network(spec.normalise(spec.uniform_noise(NOISE_BATCH, seed=1000 * seed + batch)))
    return network.eval()


def model_folding(pair: Pair, seed: int) -> nn.Module:
    """Model Folding (ICLR 2025), from the paper: similar channels become their mean, variances are repaired.

    The channels of each convolution are clustered by k-means over their weights, scaled as their BatchNorm scales
    them. What reads a merged channel gets the sum of what read its members. The spread that averaging takes from a
    channel is given back by the approximate repair of the paper's section on data-free correction, from the weights'
    mean cosine.
    """
    return folded(pair, copy.deepcopy(teacher_of(pair).model), seed)


@torch.no_grad()
def folded(pair: Pair, wide: nn.Module, seed: int) -> nn.Module:
    """The half network with the folded channels of ``wide``, which is changed."""
    small = pair.half().eval()
    for link in pair.links:
        if link.makers[0][0] in pair.convolutions:
            members = _fold(wide, small, link.makers, pair.norm_first, seed)
            for reader in link.readers:
                _read(wide, members, reader)
    small.load_state_dict(wide.state_dict())
    return small


def _fold(wide: nn.Module, small: nn.Module, makers: tuple[Maker, ...], norm_first: bool, seed: int) -> Tensor:
    """Merge the channels that layers make together, in place; returns which went into which, ``(merged, channels)``."""
    rows = [_effective(wide, layer, norm, norm_first) for layer, norm in makers]
    count = small.get_submodule(makers[0][0]).weight.shape[0]
    found = KMeans(count, n_init=10, random_state=seed).fit_predict(torch.cat(rows, 1).numpy())
    members = functional.one_hot(torch.as_tensor(found).long(), count).T.float()  # (clusters, channels)
    for (layer, norm), of_layer in zip(makers, rows, strict=True):
        _merge(wide.get_submodule(layer), wide.get_submodule(norm) if norm else None, of_layer, members)
    return members


def _scale(statistics: nn.Module) -> Tensor:
    return statistics.weight / (statistics.running_var + statistics.eps).sqrt()


def _effective(wide: nn.Module, layer: str, norm: str | None, norm_first: bool) -> Tensor:
    """A layer's weights and biases, one channel a row, scaled as its BatchNorm scales them."""
    module = wide.get_submodule(layer)
    rows = module.weight.flatten(1)
    if module.bias is not None:
        rows = torch.cat([rows, module.bias[:, None]], 1)
    if norm is None:
        return rows
    scale = _scale(wide.get_submodule(norm))
    if not norm_first and (scale < 0).any():
        raise ValueError(f"{norm} has negative scales, which cannot move to before the ReLU")
    return rows * scale[:, None]


def _merge(module: nn.Module, statistics: nn.Module | None, rows: Tensor, members: Tensor) -> None:
    """Give a layer, and its BatchNorm, the mean of each cluster's channels."""
    mean = members / members.sum(1, keepdim=True)
    merged, repair, shape = mean @ rows, _lost_spread(rows, members), module.weight.shape
    if statistics is not None:  # repair * (merged - mean) + shift, with all scales in the merged rows
        centre = mean @ (_scale(statistics) * statistics.running_mean)
        statistics.weight = nn.Parameter(repair)
        statistics.bias = nn.Parameter(mean @ statistics.bias)
        statistics.running_mean = centre
        statistics.running_var = torch.full((len(members),), 1 - statistics.eps)
    else:
        merged *= repair[:, None]
    if module.bias is not None:
        module.bias = nn.Parameter(merged[:, -1])
        merged = merged[:, :-1]
    module.weight = nn.Parameter(merged.reshape(len(members), *shape[1:]))


def _lost_spread(rows: Tensor, members: Tensor) -> Tensor:
    """By how much the mean of each cluster's channels varies less than one of them does."""
    unit = functional.normalize(rows, dim=1)
    sizes = members.sum(1)
    cosines = ((members @ unit).square().sum(1) - sizes) / (sizes * (sizes - 1)).clamp_min(1)
    spread = 1 / sizes + (1 - 1 / sizes) * cosines.clamp_min(0)
    return spread.rsqrt()


def _read(wide: nn.Module, members: Tensor, layer: str) -> None:
    """The reader of merged channels gets the sums of its weights, also where a flattening stands between."""
    module = wide.get_submodule(layer)
    weight = module.weight.view(len(module.weight), members.shape[1], -1)
    summed = torch.einsum("oip,ci->ocp", weight, members)
    shape = (len(summed), len(members), *module.weight.shape[2:]) if module.weight.ndim > 2 else (len(summed), -1)
    module.weight = nn.Parameter(summed.reshape(shape))
