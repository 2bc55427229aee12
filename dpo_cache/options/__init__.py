"""Every option of every command, written down once. Nothing in this room imports torch."""
