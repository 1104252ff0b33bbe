"""The published methods, one file or folder a paper, and the registry that finds them by name.

May import: :mod:`zskd_nni.synthesis` and what stands below it.
"""
