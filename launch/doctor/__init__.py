"""What has become of a run, told from its folder alone."""
