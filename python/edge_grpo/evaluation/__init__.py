"""Held-out accuracy: generating, grading, estimating, keeping and comparing."""
