"""What the files of a cache hold: written, read and checked."""
