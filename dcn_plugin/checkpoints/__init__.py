"""What other projects' checkpoints hold, and what it becomes."""
