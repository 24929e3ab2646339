"""Training: losses, schedules, the step, the epoch, evaluation. It is handed loaders and models."""
