"""Where a cache lies: a disk, or an object store behind an fsspec URL."""
