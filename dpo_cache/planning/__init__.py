"""Predicts whether a run will fit before it starts: memory counted without weights, and disk space."""
