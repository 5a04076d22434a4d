"""The model that is trained: loading it, its hidden states, its output head."""
