"""From soft targets to data impressions: the engine that makes them and the store that keeps them."""

from zskd_nni.synthesis.engine import FeatureTerm, Impressions, Orders, synthesize_shard
from zskd_nni.synthesis.run import TargetPlan, synthesize
from zskd_nni.synthesis.settings import SynthesisSettings
from zskd_nni.synthesis.store import ImpressionStore

__all__ = [
    "FeatureTerm",
    "ImpressionStore",
    "Impressions",
    "Orders",
    "SynthesisSettings",
    "TargetPlan",
    "synthesize",
    "synthesize_shard",
]
