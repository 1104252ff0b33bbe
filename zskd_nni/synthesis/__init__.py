"""Synthesis: the engine that makes data impressions from soft targets, and the store that keeps them.

May import: :mod:`zskd_nni.training` and the rooms below it.
"""

from zskd_nni.synthesis.engine import FeatureTerm, Impressions, ShardInputs, synthesize_shard
from zskd_nni.synthesis.settings import SynthesisSettings
from zskd_nni.synthesis.store import ImpressionStore
from zskd_nni.synthesis.synthesize import TargetPlan, synthesize

__all__ = [
    "FeatureTerm",
    "ImpressionStore",
    "Impressions",
    "ShardInputs",
    "SynthesisSettings",
    "TargetPlan",
    "synthesize",
    "synthesize_shard",
]
