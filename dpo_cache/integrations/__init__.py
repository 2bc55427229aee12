"""Other libraries that read the cache, each in a file of its own."""
