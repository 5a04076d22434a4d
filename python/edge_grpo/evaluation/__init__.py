"""Held-out accuracy: generating, estimating, keeping and comparing results."""
