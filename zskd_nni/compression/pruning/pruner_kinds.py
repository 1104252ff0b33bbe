"""Names of NNI's pruners, by what decides their masks."""

WEIGHT_PRUNERS = ("LevelPruner", "L1NormPruner", "L2NormPruner", "FPGMPruner")
"""The weights alone decide."""

SCORING_PRUNERS = ("TaylorPruner", "SlimPruner")
"""A few training steps decide: scores are collected from gradients (Taylor), or scaling factors are trained (Slim)."""

PRUNERS = (*WEIGHT_PRUNERS, *SCORING_PRUNERS, "MovementPruner")
"""All that a recipe may name; MovementPruner learns its masks in the training under the masks."""
