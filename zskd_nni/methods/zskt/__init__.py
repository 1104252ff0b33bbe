"""ZSKT: adversarial belief matching between a generator and the student (Micaelli & Storkey, NeurIPS 2019)."""
