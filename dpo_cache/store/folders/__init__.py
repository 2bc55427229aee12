"""The folder of a cache: on a disk, or in an object store behind an fsspec URL."""
