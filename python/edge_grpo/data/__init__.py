"""Where problems come from and how they become prompts: sources, templates, the built-in arithmetic, the check."""
