"""Networks: the teacher and its input, building, saving, exporting and hooking networks, and the zoo.

May import: :mod:`zskd_nni.runtime`.
"""
