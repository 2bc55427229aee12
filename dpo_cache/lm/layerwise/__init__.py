"""Layer-major execution: every forest passes one layer before any passes the next one."""
