"""The papers' tables: runs of their cells, the records of runs, and the page that is made from the records."""
