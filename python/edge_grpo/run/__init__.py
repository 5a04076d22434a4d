"""What a run leaves in its folder: log, checkpoints, report."""
