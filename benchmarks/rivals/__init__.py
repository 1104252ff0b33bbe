"""What a practitioner would use instead of this package, on the same teachers: see ``benchmarks/compare_rivals.py``.

Rivals that have a package run from it. The others are written here from their papers, in a few plain lines, and their
rows say so. None of them sees a real image.
"""
