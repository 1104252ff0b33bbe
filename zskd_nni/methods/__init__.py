"""The published methods, one file or folder per paper, and the registry that finds them by name.

May import: :mod:`zskd_nni.synthesis` and the rooms below it.
"""
