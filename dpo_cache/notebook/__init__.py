"""Jupyter notebooks: the HTML of reports, caches and pair sets, and live progress."""
