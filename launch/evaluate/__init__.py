"""`trace-rl eval`: checkpoints on sets of problems, with every sample stored."""
