"""The run directory: its file names, its lock, its typed records, its checkpoints, and what a run prints."""
