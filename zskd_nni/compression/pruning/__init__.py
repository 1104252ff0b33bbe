"""Pruning with NNI: which channels depend on each other, scoring, masking, and removing the masked channels."""
