"""Faster ways to compute what a layer computes; each docstring has the plain line that it equals."""
