"""The file formats of a cache: how each is written, read and checked."""
