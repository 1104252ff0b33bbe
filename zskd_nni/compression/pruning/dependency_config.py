"""NNI pruning configs whose masks agree between connected layers, so that the masked channels can be removed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.prune import BasePruningMethod

from zskd_nni.compression.config_names import block_sizes, checked_config_list
from zskd_nni.compression.fx_trace import own_layers, trace
from zskd_nni.compression.pruning.channel_flow import CONVOLUTIONS, ChannelFlow, channel_flow
from zskd_nni.runtime.errors import UserError

_logger = logging.getLogger(__name__)

_SPARSITY = ("sparse_ratio", "sparse_threshold")
_LIMITS = ("min_sparse_ratio", "max_sparse_ratio", "global_group_id", "internal_metric_block")


@dataclass(frozen=True)
class PruningPlan:
    """A completed config, what it does not prune, and the graph it was read from.

    It holds for every network of the same structure, whatever its weights.

    Attributes:
        config_list: for any of NNI's structured pruners, one entry per module, in the order of the graph.
        left_out: module path -> why the module is not pruned although the user's config names it.
        graph: the traced network, for :func:`~zskd_nni.compression.pruning.speedup.shrink`; None where nothing was
            traced, as for a pruner of single weights.
    """

    config_list: list[dict[str, Any]]
    left_out: dict[str, str] = field(default_factory=dict)
    graph: GraphModule | None = field(default=None, compare=False, repr=False)


def complete_config_list(model: nn.Module, config_list: list[dict[str, Any]], dummy_input: Any) -> list[dict[str, Any]]:
    """Complete a plain pruning config so that the masks of layers that share channels agree.

    As ``plan_pruning``, but the layers that are left out are logged.

    Args:
        model: the network to prune, not wrapped by a pruner.
        config_list: NNI's pruning config, for instance ``[{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}]``.
        dummy_input: one input of the network, see ``fx_trace.trace``.

    Returns:
        A config list for ``L1NormPruner``, ``L2NormPruner``, ``FPGMPruner``, ``TaylorPruner``, ``SlimPruner`` and the
        AGP and linear schedules over them.

    Raises:
        UserError: see ``plan_pruning``.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
        >>> conv, norm = complete_config_list(network, config_list, torch.zeros(2, 1, 4, 4))
        >>> conv
        {'op_names': ['0'], 'sparse_ratio': 0.5}
        >>> norm["target_settings"]["bias"]  # the BatchNorm loses the channels of its convolution
        {'align': {'module_name': '0', 'target_name': 'weight', 'dims': [0]}}
    """
    plan = plan_pruning(model, config_list, dummy_input)
    if plan.left_out:
        names = ", ".join(f"{name} ({reason})" for name, reason in plan.left_out.items())
        _logger.info("%d of the configured layers keep all their channels: %s", len(plan.left_out), names)
    return plan.config_list


def plan_pruning(model: nn.Module, config_list: list[dict[str, Any]], dummy_input: Any) -> PruningPlan:
    """Complete a plain pruning config, and list what it cannot prune.

    These keys, all NNI's own, are added to the entries:

    - ``dependency_group_id``: layers whose outputs are added or multiplied share one, and with it one mask.
    - ``internal_metric_block``: layers that feed, or are, grouped convolutions lose as many channels in each group.
    - ``align``: batch normalisation, depthwise convolutions and squeeze-and-excitation gates lose the channels of the
      layer in front. Otherwise a removed channel would come back as the normalisation's constant.

    Left out are layers whose channels cannot be removed from what follows, above all the network's outputs, and layers
    that share channels with one that the config does not name. If the config names normalisations but not the layers in
    front of them, the normalisations are ranked.

    An entry with a ``dependency_group_id``, an ``align`` or a ``granularity`` other than whole channels passes
    unchanged. NNI ranks a dependency group by itself, so a ``global_group_id`` has no effect on its members.

    Args:
        model: see ``complete_config_list``.
        config_list: see ``complete_config_list``.
        dummy_input: see ``complete_config_list``.

    Raises:
        UserError: the config names no module of the model, or none that can be pruned, or gives layers that
            share channels different sparsities.
    """
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise UserError("the model is wrapped by an NNI compressor; complete the config before making the pruner")
    _check_no_masks_of_torch(model)
    graph = trace(model, dummy_input)
    _register_own_layers(model, own_layers(graph))
    planner = _Planner(model, channel_flow(graph), _entries_by_module(model, config_list), own_layers(graph))
    planner.plan()
    _check_groups(planner.planned, planner.modules)
    left_out = {name: why for name, why in planner.left_out.items() if name in planner.entries}
    if not any(map(_is_active, planner.planned.values())):
        raise UserError(_nothing_to_prune(left_out, planner))
    completed = [{"op_names": [name], **planner.planned[name]} for name in planner.modules if name in planner.planned]
    return PruningPlan(completed, left_out, graph)


def _nothing_to_prune(left_out: dict[str, str], planner: _Planner) -> str:
    """Three of the reasons, each once, and what else could be named."""
    if planner.entries and not left_out:
        named = ", ".join(list(planner.entries)[:3])
        return f"the pruning config gives {named} no sparsity; add sparse_ratio, such as 'sparse_ratio': 0.5"
    first: dict[str, str] = {}
    for name, reason in left_out.items():
        first.setdefault(reason, name)
    reasons = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:3])
    others = [name for name in planner.flow.sources if name not in planner.entries and not planner.flow.reason(name)]
    advice = (
        f"name other layers, such as {others[0]}" if others else "no other layer of this network can be pruned either"
    )
    return f"nothing that the pruning config names can be pruned ({reasons}); {advice}"


def _check_no_masks_of_torch(model: nn.Module) -> None:
    """Refuse layers under the masks of ``torch.nn.utils.prune``, whose weights are computed anew at every call."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                raise UserError(
                    f"{name} is pruned by torch.nn.utils.prune, and NNI prunes stored weights; first make that "
                    f"permanent: torch.nn.utils.prune.remove(model.get_submodule({name!r}), "
                    f"{getattr(hook, '_tensor_name', 'weight')!r})"
                )


def _register_own_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """NNI prunes classes that it knows by name: those of the user's are pruned as the layers that they compute."""
    from nni.compression.base.setting import PruningSetting

    for name, layer in layers.items():
        setting = PruningSetting.registry[type(layer).__name__]
        PruningSetting.registry.setdefault(type(model.get_submodule(name)).__name__, setting)


def _entries_by_module(model: nn.Module, config_list: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The user's entry of each module, without the keys that select modules.

    As in NNI several entries may name one module; for each of its targets the first entry counts.
    """
    from nni.compression.base.config import select_modules_by_config

    entries: dict[str, dict[str, Any]] = {}
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for position, config in enumerate(checked_config_list(model, config_list, "pruning")):
        selected, public, _ = select_modules_by_config(model, config)
        if not selected:
            raise UserError(f"entry {position} of the pruning config selects no module of the model: {config}")
        for name, module in selected.items():
            own = _with_named_granularity(module, public)
            entries[name] = _joined(module, entries[name], own) if name in entries else own
    return {name: entries[name] for name in names if name in entries}


def _with_named_granularity(module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
    """A copy in which a list such as ``[1, -1, -1, -1]`` is ``out_channel``, which it means."""
    result = deepcopy(entry)
    for name, setting in (("weight", result), *result.get("target_settings", {}).items()):
        value, parameter = setting.get("granularity"), getattr(module, name, None)
        dims = parameter.dim() if isinstance(parameter, Tensor) and isinstance(value, list | tuple) else 0
        if dims and block_sizes(value, dims) == block_sizes("out_channel", dims):
            setting["granularity"] = "out_channel"
    return result


def _check_groups(planned: dict[str, dict[str, Any]], modules: Mapping[str, nn.Module]) -> None:
    """The settings that NNI compares or divides by without a word on the module."""
    ratios: dict[Any, dict[str, Any]] = {}
    for name, entry in planned.items():
        group, ratio = _value(entry, "global_group_id"), _value(entry, "sparse_ratio")
        dependent = _value(entry, "dependency_group_id") is not None
        if group is not None and not dependent and ratio is not None:
            ratios.setdefault(group, {})[name] = ratio
        elif group is not None and dependent:
            _logger.warning(
                "%s shares its channels with other layers, so that it is pruned to its own sparse_ratio and not ranked "
                "with the other layers of the global_group_id %r.",
                name,
                group,
            )
        if group is not None and not dependent and ratio is None:
            raise UserError(f"{name} has the global_group_id {group!r} without a sparse_ratio; give one to the group")
        block, weight = _value(entry, "internal_metric_block"), getattr(modules[name], "weight", None)
        if block is not None and weight is not None and len(weight) % block:
            raise UserError(f"internal_metric_block {block} does not divide the {len(weight)} channels of {name}")
        if _value(entry, "apply_method") == "bypass" and _is_active(entry):
            _logger.warning(
                "%s has the apply_method 'bypass': its mask is not applied in training; its channels go at the end.",
                name,
            )
    for group, named in ratios.items():
        first, *others = named
        for other in others:
            if named[other] != named[first]:
                raise UserError(
                    f"the global_group_id {group!r} has the sparse_ratio {named[first]} for {first} and {named[other]} "
                    f"for {other}; a group that is ranked together has one"
                )


def _target_names(module: nn.Module, entry: dict[str, Any]) -> list[str]:
    """The targets of an entry; as for NNI, all that the module has if the entry names none."""
    return list(entry.get("target_names") or (name for name in ("weight", "bias") if hasattr(module, name)))


def _joined(module: nn.Module, first: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """``first`` with those targets of ``later`` that it has not got, each with the settings of its own entry."""
    known = _target_names(module, first)
    fresh = [name for name in _target_names(module, later) if name not in known]
    if not fresh:
        return first
    settings = {}
    for entry, names in ((first, known), (later, fresh)):
        shortcuts = {key: value for key, value in entry.items() if key not in ("target_names", "target_settings")}
        for name in names:
            # NNI applies its shortcuts to the settings that a target has by default: a bias has no sparsity.
            own = {key: value for key, value in shortcuts.items() if name != "bias" or key in ("align", "apply_method")}
            settings[name] = deepcopy({**own, **entry.get("target_settings", {}).get(name, {})})
    return {"target_names": [*known, *fresh], "target_settings": settings}


def _settings(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry, *entry.get("target_settings", {}).values()]


def _value(entry: dict[str, Any], key: str) -> Any:
    """A setting of the weight: in its target settings, or in the entry as a shortcut."""
    return entry.get("target_settings", {}).get("weight", {}).get(key, entry.get(key))


def _is_active(entry: dict[str, Any]) -> bool:
    return any(setting.get(key) is not None for setting in _settings(entry) for key in _SPARSITY)


def _passes_unchanged(entry: dict[str, Any]) -> bool:
    """Whether the user decided about this module's mask in a way that nothing may be added to."""
    settings, names = _settings(entry), entry.get("target_names", [])
    grouped = any(setting.get(key) is not None for setting in settings for key in ("dependency_group_id", "align"))
    whole = all(setting.get("granularity", "default") in ("default", "out_channel") for setting in settings)
    return grouped or not whole or any(name.startswith(("_input_", "_output_")) for name in names)


class _Planner:
    """Decides group by group: ``planned`` are the completed entries, ``left_out`` the reasons against the others."""

    def __init__(
        self,
        model: nn.Module,
        flow: ChannelFlow,
        entries: dict[str, dict[str, Any]],
        layers: dict[str, nn.Module],
    ) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False)) | layers
        self.flow, self.entries = flow, entries
        self.depthwise = {name for name in flow.followers if isinstance(self.modules[name], CONVOLUTIONS)}
        self.own = [name for name, entry in entries.items() if _passes_unchanged(entry)]
        self.planned: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}

    def plan(self) -> None:
        seen: set[str] = set()
        for name in self.flow.sources:
            if name not in seen:
                group = self.flow.tied(name)
                seen.update(group)
                self.plan_group(group)
        for name, entry in self.entries.items():
            if name in seen:
                continue
            if name in self.own:
                self.planned[name] = entry
            elif name in self.flow.composite:
                self.left_out[name] = "its channels come from several layers, and it cannot drop what they keep"
            elif name in self.flow.followers:
                self.left_out[name] = self.flow.reason(name) or "its channels are the network's input"
            else:
                why = "it has no channels that could be followed in the evaluation graph"
                self.left_out[name] = self.flow.unfollowed.get(name, why)

    def plan_group(self, group: list[str]) -> None:
        """Plan the layers that lose the same channels: some of them rank the channels, the others align."""
        sources = [name for name in group if name in self.flow.sources]
        norms = [name for name in group if name not in sources and name not in self.depthwise]
        own = [name for name in group if name in self.own]
        named = [name for name in group if name in self.entries and name not in own and _is_active(self.entries[name])]
        self.planned |= {name: self.entries[name] for name in own}
        leaders = [name for name in sources if name in named]
        if not leaders and not own and any(name in named for name in norms):
            self.rank_by_norms(group, [name for name in norms if name in named], norms)
            return
        unnamed = [name for name in sources if name not in named + own and name not in self.flow.gates]
        reason = self.reason(group, unnamed if leaders else [])
        if not leaders and not any(name in sources for name in own):  # a depthwise convolution alone, or nothing
            reason = "its channels are those of a layer that the config does not name"
        if reason:
            self.left_out |= dict.fromkeys(named, reason)
            return
        if own:
            together = own + leaders
            self.planned |= {name: self.entries[name] for name in leaders}
        else:
            self.check_sparsity(named)
            # NNI averages the metrics of a dependency group, which must therefore have one shape.
            rank = self.modules[leaders[0]].weight.dim()
            together = [name for name in leaders if self.modules[name].weight.dim() == rank]
            if _value(self.entries[leaders[0]], "sparse_threshold") is not None:
                together = together[:1]  # NNI's dependency groups know ratios only
            self.rank(together, self.blocks(group))
        first = next((name for name in together if name in sources), together[0])
        for name in group:
            if name not in together:
                self.align(name, first)

    def rank(self, leaders: list[str], blocks: int) -> None:
        """The leaders rank the channels together."""
        for name in leaders:
            entry = deepcopy(self.entries[name])
            if entry.get("target_names") == ["weight"]:
                entry["target_names"] = ["weight", "bias"]  # a bias that stays would keep its channel alive
            if len(leaders) > 1 or blocks > 1 or (_value(entry, "internal_metric_block") or 1) > 1:
                entry["dependency_group_id"] = f"channels of {leaders[0]}"
            if blocks > 1 and _value(entry, "internal_metric_block") is None:
                entry["internal_metric_block"] = blocks
            self.planned[name] = entry

    def rank_by_norms(self, group: list[str], named: list[str], norms: list[str]) -> None:
        """Normalisations rank their channels; ``shrink`` finds the layers in front of them.

        NNI cannot align anything with a vector (``Tensor.sum`` over no dimension sums over all). Weight and bias of a
        normalisation are therefore ranked together, as one dependency group.
        """
        reason = self.reason(group, [name for name in norms if name not in named])
        if not reason and self.flow.read_raw.intersection(self.flow.followers[norms[0]].tolist()):
            reason = "some layer reads its channels past the normalisation"
        if reason:
            self.left_out |= dict.fromkeys(named, reason)
            return
        self.check_sparsity(named)
        blocks = self.blocks(group)
        for name in named:
            entry = self.entries[name]
            if _value(entry, "sparse_threshold") is not None:
                raise UserError(
                    f"{name} is a {type(self.modules[name]).__name__}, whose weight and bias must lose the same "
                    f"channels, and a sparse_threshold cannot see to that; give a sparse_ratio"
                )
            keys = ("sparse_ratio", *_LIMITS, "apply_method")
            setting = {key: _value(entry, key) for key in keys if _value(entry, key) is not None}
            setting |= {"dependency_group_id": f"channels of {named[0]}", "granularity": "out_channel"}
            if blocks > 1:
                setting.setdefault("internal_metric_block", blocks)
            self.planned[name] = {
                "target_names": ["weight", "bias"],
                "target_settings": {"weight": setting, "bias": dict(setting)},
            }

    def reason(self, group: list[str], unnamed: list[str]) -> str | None:
        """Why the channels of a group stay, of which the config ought to prune those ``unnamed`` too."""
        shared = f"it shares channels with {unnamed[0]}, which the config does not prune" if unnamed else None
        return self.flow.reason(group[0]) or shared

    def blocks(self, group: list[str]) -> int:
        return max(self.flow.blocks.get(name, 1) for name in group)

    def align(self, name: str, leader: str) -> None:
        """The module loses the channels that the leader loses."""
        alignment = {"module_name": leader, "target_name": "weight", "dims": [0]}
        targets = [target for target in ("weight", "bias") if getattr(self.modules[name], target, None) is not None]
        if targets:
            self.planned[name] = {
                **{key: value for key, value in self.entries.get(name, {}).items() if key == "apply_method"},
                "target_names": targets,
                "target_settings": {target: {"align": dict(alignment)} for target in targets},
            }

    def check_sparsity(self, named: list[str]) -> None:
        # A depthwise convolution follows the others, whatever it is given.
        names = [name for name in named if name not in self.depthwise]
        for key in (*_SPARSITY, *_LIMITS):
            values = {name: _value(self.entries[name], key) for name in names}
            first = next(iter(values))
            for other in (name for name in names if values[name] != values[first]):
                raise UserError(
                    f"{first} and {other} share their channels, but the pruning config gives them {key} "
                    f"{values[first]} and {values[other]}; give both the same"
                )
