"""What happens to completions that reach the response budget: they may be left out, and length may cost reward.

Reference: DAPO, arXiv:2503.14476, section 3.4. Must not know rewards or advantages.
"""

from __future__ import annotations

from pydantic import Field

from trace_rl.config.base import Section


class Overlong(Section):
    """Treatment of long completions; off by default."""

    mask: bool = False
    """Whether truncated completions add nothing to the loss (overlong filtering); they stay in their group's
    statistics."""
    penalty_frac: float = Field(0.0, ge=0, le=1)
    """Share of sampling.max_response_tokens, counted from its end, in which the reward falls by up to 1; 0: no penalty.
    The paper's cache of 4096 of 20480 tokens is 0.2."""

    def penalty(self, length: int, max_tokens: int) -> float:
        """What is added to the reward of a completion: in [-1, 0].

        0 up to (1 - penalty_frac) max_tokens, then linear to -1 at max_tokens, -1 beyond (arXiv:2503.14476, eq. 13).

        Args:
            length: tokens of the completion.
            max_tokens: the budget.
        """
        if not self.penalty_frac:
            return 0.0
        interval = self.penalty_frac * max_tokens
        return -min(1.0, max(0.0, (length - (max_tokens - interval)) / interval))
