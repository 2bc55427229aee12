"""A causal LM as a function: completions -> log-probs, each distinct prefix computed once."""
