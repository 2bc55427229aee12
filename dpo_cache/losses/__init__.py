"""Preference losses: pure functions of log-probs, and the table that lists them."""
