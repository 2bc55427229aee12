"""Every option of every command, defined once. Nothing in this room imports torch."""
