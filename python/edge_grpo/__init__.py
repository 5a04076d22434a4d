"""EDGE-GRPO (arXiv:2507.21848): train a language model by GRPO with entropy-driven advantages and guided correction.

Nothing is imported here: ``edge-grpo --help`` must not wait for torch, and each module says what it needs.
"""
