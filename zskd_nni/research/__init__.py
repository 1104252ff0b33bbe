"""Reproducing the papers: tables and records, baselines, training of teachers, the explorer, notebook figures.

May import: every other room. No room imports it.
"""
