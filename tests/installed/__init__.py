"""Checks of `make dist`: what the archives hold, and whether the installed package runs."""
