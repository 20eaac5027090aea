"""Ray actors: one class a file, thin methods around `trace_rl`. vLLM, DeepSpeed and HTTP live here and only here.

Every process of a run imports this package before it does anything, so what is logged in any of them has no secrets.
"""

from trace_rl.workers import log_redaction

log_redaction.install()
