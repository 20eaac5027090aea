"""Pages to look at runs with: one file each, which needs no network and lets nothing but its own script run."""
