"""Upkeep of a cache: verify, repair, compact, gc, remove, merge, diff, copy."""
