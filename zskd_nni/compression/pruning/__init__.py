"""Pruning with NNI: what may be cut together, scoring and masking, and making the network really smaller."""
