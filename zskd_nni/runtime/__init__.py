"""Files, locks, seeds, signals, devices, processes and progress: nothing here knows about networks.

May import: the standard library, torch and small utilities; no other room.
"""
