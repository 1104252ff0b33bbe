"""Training a network: the loop and its checkpoint, losses, distillation, inference and metrics.

May import: :mod:`zskd_nni.data` and the rooms below it.
"""
