"""What keeps a cache in order: verify, repair, compact, gc, remove, merge, diff, copy."""
