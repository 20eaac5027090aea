"""What a run will do and take, worked out before anything starts (`trace-rl plan`); `run_plan` is the way in."""
