"""Images: reading data sets, procedural images, augmentation, and the sources of transfer batches.

May import: :mod:`zskd_nni.models` and the rooms below it.
"""
