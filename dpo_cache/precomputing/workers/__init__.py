"""Precompute in several processes: the driver cuts units, workers score and publish them."""
