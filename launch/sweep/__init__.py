"""Sweeps: plan, run, status and report of the cells that `trace_rl.sweeps` makes of a file."""
