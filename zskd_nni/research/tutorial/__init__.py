"""Figures and tables of the tutorial notebooks: drawn, measured, or read from result files. No method is in here."""
