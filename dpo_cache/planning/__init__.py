"""What will fit, before it runs: memory counted without weights, and disk space."""
