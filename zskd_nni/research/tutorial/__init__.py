"""What the tutorial notebooks show: pictures, tables, figures from result files. No method is in here."""

from zskd_nni.research.tutorial.embedding import embed, features
from zskd_nni.research.tutorial.measuring import Measured, images_if_there, measure, measured_table
from zskd_nni.research.tutorial.pictures import (
    bars_picture,
    confusion_picture,
    curves_picture,
    embedding_picture,
    evolution_picture,
    gallery_picture,
    opinions_picture,
    similarity_picture,
    targets_picture,
    transitions_picture,
    widths_picture,
)
from zskd_nni.research.tutorial.records import recipe_records, recipes_table, repository, reproduction_table
from zskd_nni.research.tutorial.shown import Picture, Table

__all__ = [
    "Measured",
    "Picture",
    "Table",
    "bars_picture",
    "confusion_picture",
    "curves_picture",
    "embed",
    "embedding_picture",
    "evolution_picture",
    "features",
    "gallery_picture",
    "images_if_there",
    "measure",
    "measured_table",
    "opinions_picture",
    "recipe_records",
    "recipes_table",
    "repository",
    "reproduction_table",
    "similarity_picture",
    "targets_picture",
    "transitions_picture",
    "widths_picture",
]
