"""Adapters for other libraries that read the cache, one file for each."""
