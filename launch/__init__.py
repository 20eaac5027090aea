"""What a user starts: the command line, planning, submission, evaluation and views of a run."""
