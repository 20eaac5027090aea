"""What annotations were worth: a step's figures, and warnings where they stay beyond the configured limits.

Invariants: the order in which rollouts come does not change a digit; a rollout that was asked for is either annotated
or failed with a cause; a figure whose denominator is 0 is left out.

This module must not know who annotates, how rollouts reach it, or what warnings are written to.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from trace_rl.agreement import agreement
from trace_rl.annotation import OTHER_TYPE
from trace_rl.batch import AnnotatedRollout, AnnotationCause, Span, SpanClass
from trace_rl.config.annotator import Audit

_COUNTED = {
    "out_of_range": "out_of_range",
    "hidden_spans": "hidden_spans",
    "malformed_spans": "malformed_spans",
    "unknown_types": "unknown_types",
    "overlaps": "merged",
    "round_trip_errors": "round_trip_errors",
    "repairs": "repairs",
    "reflections": "reflections_kept",
    "rule_compared": "rule_compared",
    "rule_silent": "rule_silent",
}
"""Metric -> the key of a rollout's audit that it is the sum of."""


def rule_audit(
    found: Collection[Span], reference: Collection[Span], num_tokens: int, span_class: SpanClass
) -> dict[str, float]:
    """Counts of how the spans of one response agree with those of a rule, both after the cap.

    A response on which the rule is silent is counted as that alone: a wrong response has a mistake somewhere, also
    where the rule knows none, so spans there are neither right nor wrong.

    Args:
        span_class: the first error is looked for among error spans only.
    """
    if not reference:
        return {"rule_silent": 1.0}
    counts = agreement(found, reference, num_tokens)
    is_error = span_class == "error"
    return {
        "rule_compared": 1.0,
        "rule_tp": float(counts.true_positives),
        "rule_fp": float(counts.false_positives),
        "rule_fn": float(counts.false_negatives),
        "rule_has_error": float(is_error),
        "first_error_hit": float(is_error and counts.is_first_hit),
    }


class _Seen(NamedTuple):
    """What is kept of one rollout that was asked for."""

    cause: AnnotationCause
    audit: Mapping[str, float]
    num_tokens: int
    types: tuple[str, ...]
    """Of its spans."""


class AnnotationAudit:
    """Counts annotated rollouts, from any thread, until they are read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: list[_Seen] = []

    def count(self, annotated: AnnotatedRollout) -> None:
        """Take in one rollout.

        Read of its `audit`, where what is missing counts 0, are the keys of `trace_rl.annotation.resolve` and of
        `rule_audit`, and malformed_spans, hidden_spans, elided_segments, repairs, reflections, reflections_kept.
        """
        types = tuple(span.type for span in annotated.spans)
        seen = _Seen(annotated.cause, annotated.audit, len(annotated.graded.rollout.token_ids), types)
        with self._lock:
            self._seen.append(seen)

    def read(self) -> dict[str, float]:
        """The figures since the last read, as `annotation/...`.

        * annotated, not_requested, failed, failed/{cause}: together all rollouts; failed_frac: of those asked for;
          empty_frac: annotated rollouts without a span.
        * spans, types/{type}: spans that are left after the cap. All other figures of spans are of those that were
          said: spans_located_frac names existing, shown segments; out_of_range_frac names segments that do not exist or
          were not shown (hidden_spans); malformed_spans could not be read; unknown_types; overlaps were merged.
        * coverage_before_cap_frac, coverage_frac: share of a response's tokens, mean over annotated rollouts; cut_frac:
          marked tokens that the cap cut off; round_trip_errors: spans whose text does not lead back to their tokens.
        * elided_frac: annotated rollouts whose middle was not shown; repairs; reflections, reflections_dropped.
        * rule_compared, rule_silent: rollouts; rule_precision, rule_recall: over all tokens of those compared;
          first_error_hit_frac: wrong rollouts whose first span shares a token with the rule's first.
        """
        with self._lock:
            seen, self._seen = self._seen, []
        annotated = [item for item in seen if item.cause == "annotated"]
        metrics = {**_causes(seen), **_spans(annotated), **_coverage(annotated), **_agreement(annotated)}
        return {f"annotation/{name}": value for name, value in metrics.items()}


def _causes(seen: Sequence[_Seen]) -> dict[str, float]:
    causes = Counter(item.cause for item in seen)
    num_annotated, num_not_requested = causes.pop("annotated", 0), causes.pop("not_requested", 0)
    num_failed = causes.total()
    return {
        "annotated": float(num_annotated),
        "not_requested": float(num_not_requested),
        "failed": float(num_failed),
        **{f"failed/{cause}": float(count) for cause, count in sorted(causes.items())},
        **_share("failed_frac", num_failed, num_annotated + num_failed),
    }


def _spans(annotated: Sequence[_Seen]) -> dict[str, float]:
    total = _summing(annotated)
    not_shown = total("out_of_range") + total("hidden_spans")
    located = total("spans_before_cap") + total("merged")  # each merge makes one span of two
    said = located + not_shown + total("malformed_spans")
    types = Counter(name for item in annotated for name in item.types)
    return {
        **{metric: total(key) for metric, key in _COUNTED.items()},
        "reflections_dropped": total("reflections") - total("reflections_kept"),
        "spans": float(types.total()),
        **{f"types/{name}": float(count) for name, count in sorted(types.items())},
        **_share("empty_frac", sum(not item.types for item in annotated), len(annotated)),
        **_share("spans_located_frac", located, said),
        **_share("out_of_range_frac", not_shown, said),
        **_share("unknown_types_frac", total("unknown_types"), said),
    }


def _coverage(annotated: Sequence[_Seen]) -> dict[str, float]:
    total = _summing(annotated)
    before, after = total("tokens_before_cap"), total("tokens_after_cap")
    elided = sum(item.audit.get("elided_segments", 0.0) > 0 for item in annotated)
    return {
        **_share("coverage_before_cap_frac", _sum_of_shares(annotated, "tokens_before_cap"), len(annotated)),
        **_share("coverage_frac", _sum_of_shares(annotated, "tokens_after_cap"), len(annotated)),
        **_share("cut_frac", before - after, before),
        **_share("elided_frac", elided, len(annotated)),
    }


def _agreement(annotated: Sequence[_Seen]) -> dict[str, float]:
    total = _summing(annotated)
    hits = total("rule_tp")
    return {
        **_share("rule_precision", hits, hits + total("rule_fp")),
        **_share("rule_recall", hits, hits + total("rule_fn")),
        **_share("first_error_hit_frac", total("first_error_hit"), total("rule_has_error")),
    }


def _summing(annotated: Sequence[_Seen]) -> Callable[[str], float]:
    return lambda key: math.fsum(item.audit.get(key, 0.0) for item in annotated)


def _sum_of_shares(annotated: Sequence[_Seen], key: str) -> float:
    return math.fsum(item.audit.get(key, 0.0) / item.num_tokens for item in annotated if item.num_tokens)


def _share(name: str, part: float, whole: float) -> dict[str, float]:
    return {name: part / whole} if whole else {}


class _Limit(NamedTuple):
    """A share that is suspect above a setting of annotator.audit."""

    metric: str
    setting: str
    found: str
    """What is too much, as "... of the annotated rollouts"."""
    advice: str


_LIMITS = (
    _Limit(
        "annotation/failed_frac",
        "max_failed_frac",
        "of the rollouts that should have been annotated were not",
        "annotation/failed/* counts the causes; these rollouts are left to the policy gradient alone",
    ),
    _Limit(
        "annotation/empty_frac",
        "max_empty_frac",
        "of the annotated rollouts have no span",
        "read some of their answers; a stronger annotator or a larger annotator.backend.max_reply_tokens may help",
    ),
    _Limit(
        "annotation/out_of_range_frac",
        "max_out_of_range_frac",
        "of the annotator's spans name segments that do not exist or were not shown",
        "it does not follow the numbering: take a stronger annotator, or shorter responses",
    ),
    _Limit(
        "annotation/unknown_types_frac",
        "max_unknown_type_frac",
        f"of the annotator's spans have a type outside of the closed list and are read as `{OTHER_TYPE}`",
        "let the server enforce the schema (annotator.backend.structured_output), or adapt annotator.types",
    ),
    _Limit(
        "annotation/cut_frac",
        "max_cut_frac",
        "of the marked tokens are cut off by the cap",
        "the annotator marks too much: lower annotator.backend.max_spans, cut shorter segments, or raise "
        "annotator.coverage_cap",
    ),
)
_ROUND_TRIP = "annotation/round_trip_errors"


class AuditWatch:
    """Says once when a share has been above its limit for `for_steps` steps in a row, and again only after it has been
    within the limit in between. A step that lacks the share, because nothing was annotated, does not count. Spans whose
    text does not lead back to their tokens are reported at once."""

    def __init__(self, settings: Audit) -> None:
        self._settings = settings
        self._steps_above: Counter[str] = Counter()

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        """Take in a step's figures from `AnnotationAudit.read`; returns a sentence for each warning."""
        warnings = []
        for limit in _LIMITS:
            largest: float = getattr(self._settings, limit.setting)
            if self._is_news(metrics, limit.metric, largest, self._settings.for_steps):
                warnings.append(
                    f"{metrics[limit.metric]:.1%} {limit.found} at this step, and for {self._settings.for_steps} steps "
                    f"in a row more than annotator.audit.{limit.setting} = {largest:g}; {limit.advice}."
                )
        if self._is_news(metrics, _ROUND_TRIP, 0.0, 1):
            warnings.append(
                f"{metrics[_ROUND_TRIP]:g} spans of this step do not lead from their text back to their tokens, which "
                "never happens with a sound tokenizer; do not trust its masks, and check the tokenizer of model.path."
            )
        return warnings

    def _is_news(self, metrics: Mapping[str, float], metric: str, largest: float, for_steps: int) -> bool:
        """Whether the figure is above its limit for just so many steps in a row."""
        if metric not in metrics:
            return False
        self._steps_above[metric] = self._steps_above[metric] + 1 if metrics[metric] > largest else 0
        return self._steps_above[metric] == for_steps
