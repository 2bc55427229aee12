"""Policy-only preference training from stored log-probs. This package never reads a data set or loads a
reference.
"""
