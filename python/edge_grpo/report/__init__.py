"""A page about one or several runs, and about groups of them: what they hold, drawn and compared."""
