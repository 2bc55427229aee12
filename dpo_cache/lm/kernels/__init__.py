"""Faster ways to compute a layer's output; each docstring has the plain line that it equals."""
