"""Policy-only preference training from stored log-probs. This room never reads a data set or loads a
reference.
"""
