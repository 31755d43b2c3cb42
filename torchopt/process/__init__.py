"""What belongs to the caller's process and is left as it was: torch's modes, and the random generators."""
