"""Runs and pair sets as tables, plots and pages."""
