"""The token forest: its layout, its stream of chunks, and attention over it."""
