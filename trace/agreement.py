"""How far two sets of spans on the same response agree, token by token.

One set is the reference: a rule's, or another annotator's. Both sets are taken as they are; where they were capped, the
cap bounds precision and recall as well.

Invariants: counts of responses add up, so the figures of many responses do not depend on their order; a figure whose
denominator is 0 is left out, never 0 or 1 by convention.

This module must not know who found the spans or what they are used for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from trace_rl.batch import Span


@dataclass(frozen=True)
class Agreement:
    """Counts over the tokens of one response, and what was made of the reference's first span."""

    true_positives: int
    """Tokens in both sets."""
    false_positives: int
    """Tokens in a found span only."""
    false_negatives: int
    """Tokens in a reference span only."""
    same_type: int
    """Tokens in both sets that both give the same type."""
    has_first: bool
    """Whether the reference has a span at all."""
    is_first_hit: bool
    """Whether the earliest found span shares a token with the earliest reference span: both see the same beginning."""
    is_first_touched: bool
    """Whether any found span shares a token with the earliest reference span."""

    @property
    def is_empty(self) -> bool:
        """Whether neither set has a span."""
        return not self.true_positives + self.false_positives + self.false_negatives


def agreement(found: Collection[Span], reference: Collection[Span], num_tokens: int) -> Agreement:
    """Compare the spans that were found with those of the reference.

    Args:
        found, reference: disjoint spans within the response, in any order.
        num_tokens: tokens of the response.

    Raises:
        ValueError: a span ends behind the response, so that the two sets cannot be of this response.
    """
    beyond = [span for span in [*found, *reference] if span.end > num_tokens]
    if beyond:
        raise ValueError(
            f"a span ends at token {beyond[0].end} of a response of {num_tokens} tokens; compare spans of one response"
        )
    in_found, in_reference = _mask(found, num_tokens), _mask(reference, num_tokens)
    first_found = sorted(found, key=lambda span: span.start)[:1]
    first = sorted(reference, key=lambda span: span.start)[:1]
    return Agreement(
        true_positives=int((in_found & in_reference).sum()),
        false_positives=int((in_found & ~in_reference).sum()),
        false_negatives=int((~in_found & in_reference).sum()),
        same_type=_overlap((one, other) for one in found for other in reference if one.type == other.type),
        has_first=bool(first),
        is_first_hit=_overlap((one, other) for one in first_found for other in first) > 0,
        is_first_touched=_overlap((one, other) for one in found for other in first) > 0,
    )


def agreement_metrics(compared: Iterable[Agreement]) -> dict[str, float]:
    """Figures of many responses: all tokens count alike, whichever response they are in.

    precision = tp / (tp + fp), recall = tp / (tp + fn), f1 = 2 tp / (2 tp + fp + fn), type_agreement_frac = same type /
    tp, first_error_hit_frac and first_error_touched_frac = share of the responses whose reference has a span.
    Responses on which both sets are empty say nothing about these; they are counted as `both_empty`, all others as
    `compared`.
    """
    items = list(compared)
    hits = sum(item.true_positives for item in items)
    found = hits + sum(item.false_positives for item in items)
    wanted = hits + sum(item.false_negatives for item in items)
    num_first = sum(item.has_first for item in items)
    num_empty = sum(item.is_empty for item in items)
    shares = {
        "precision": (hits, found),
        "recall": (hits, wanted),
        "f1": (2 * hits, found + wanted),
        "type_agreement_frac": (sum(item.same_type for item in items), hits),
        "first_error_hit_frac": (sum(item.is_first_hit for item in items), num_first),
        "first_error_touched_frac": (sum(item.is_first_touched for item in items), num_first),
    }
    counts = {"compared": float(len(items) - num_empty), "both_empty": float(num_empty)}
    return counts | {name: part / whole for name, (part, whole) in shares.items() if whole}


def _mask(spans: Iterable[Span], num_tokens: int) -> Bool[np.ndarray, " time"]:
    mask = np.zeros(num_tokens, dtype=bool)
    for span in spans:
        mask[span.start : span.end] = True
    return mask


def _overlap(pairs: Iterable[tuple[Span, Span]]) -> int:
    """Tokens that the two spans of each pair share."""
    return sum(max(0, min(one.end, other.end) - max(one.start, other.start)) for one, other in pairs)
