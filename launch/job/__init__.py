"""Runs as jobs of a Ray cluster: what is shipped (`staging`, `own_code`), how it is started (`submit`) and followed
(`jobs`), and what changes inside of one (`inside_job`)."""
