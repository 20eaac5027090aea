"""Ray actors: one class a file, thin methods around `trace_rl`. vLLM, DeepSpeed and HTTP live here and only here."""
