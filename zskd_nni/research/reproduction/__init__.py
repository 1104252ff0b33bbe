"""The papers' tables: cells that are run, records that they leave, and the page that is made of the records."""
