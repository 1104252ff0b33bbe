"""Baselines that are no transfer methods: students that are trained on real labels."""
