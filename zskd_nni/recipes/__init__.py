"""Recipes: the schema of the YAML, loading it, the packaged files, and search spaces.

May import: :mod:`zskd_nni.methods` and the rooms below it. Nothing here runs a recipe.
"""
