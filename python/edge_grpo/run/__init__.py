"""A run's folder: writing its log, checkpoints and files, reading them again, drawing the report."""
