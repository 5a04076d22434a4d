"""The backends: each is a module with the functions that contract.py lists."""
