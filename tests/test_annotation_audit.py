"""A step's figures worked out by hand, and warnings that come once."""

import itertools
import random
import threading
from collections.abc import Mapping
from dataclasses import replace

import pytest
from rollouts import annotated, error, key

from trace_rl.annotation_audit import AnnotationAudit, AuditWatch, rule_audit
from trace_rl.batch import AnnotatedRollout, AnnotationCause, Span
from trace_rl.config.annotator import Audit


def seen(
    sample: int, length: int, *spans: Span, cause: AnnotationCause = "annotated", **audit: float
) -> AnnotatedRollout:
    return replace(annotated("p", sample, length, 0.0, *spans), cause=cause, audit=audit)


FIRST = seen(
    0,
    100,
    error(10, 30),
    error(40, 45),
    spans_before_cap=3.0,
    merged=1.0,
    out_of_range=2.0,
    hidden_spans=1.0,
    malformed_spans=1.0,
    unknown_types=1.0,
    tokens_before_cap=40.0,
    tokens_after_cap=25.0,
    elided_segments=7.0,
    repairs=1.0,
    reflections=1.0,
    reflections_kept=1.0,
    rule_compared=1.0,
    rule_tp=5.0,
    rule_fp=20.0,
    rule_fn=5.0,
    rule_has_error=1.0,
    first_error_hit=1.0,
)
SECOND = seen(
    1,
    50,
    key(0, 10),
    spans_before_cap=1.0,
    tokens_before_cap=10.0,
    tokens_after_cap=10.0,
    round_trip_errors=1.0,
    reflections=1.0,
    rule_compared=1.0,
    rule_tp=10.0,
    rule_fn=10.0,
    rule_has_error=1.0,
)
EMPTY = seen(2, 10, out_of_range=1.0, rule_silent=1.0)
STEP = [
    FIRST,
    SECOND,
    EMPTY,
    seen(3, 10, cause="timeout"),
    seen(4, 10, cause="timeout"),
    seen(5, 10, cause="failed"),
    seen(6, 10, cause="not_requested"),
]


def figures(*items: AnnotatedRollout) -> dict[str, float]:
    audit = AnnotationAudit()
    for item in items:
        audit.count(item)
    return {name.removeprefix("annotation/"): value for name, value in audit.read().items()}


def test_a_step_by_hand() -> None:
    """Said were 4 + 2 + 1 + 1 spans (3 + 1 located), then 1, then 1: 10, of which 4 + 1 are located."""
    assert figures(*STEP) == {
        "annotated": 3.0,
        "not_requested": 1.0,
        "failed": 3.0,
        "failed/failed": 1.0,
        "failed/timeout": 2.0,
        "failed_frac": 3 / 6,
        "out_of_range": 3.0,
        "hidden_spans": 1.0,
        "malformed_spans": 1.0,
        "unknown_types": 1.0,
        "overlaps": 1.0,
        "round_trip_errors": 1.0,
        "repairs": 1.0,
        "reflections": 1.0,
        "reflections_dropped": 1.0,
        "rule_compared": 2.0,
        "rule_silent": 1.0,
        "spans": 3.0,
        "types/arith": 1.0,
        "types/copy": 2.0,
        "empty_frac": 1 / 3,
        "spans_located_frac": 5 / 10,
        "out_of_range_frac": 4 / 10,  # hidden ones too
        "unknown_types_frac": 1 / 10,
        "coverage_before_cap_frac": (0.4 + 0.2) / 3,
        "coverage_frac": (0.25 + 0.2) / 3,
        "cut_frac": 15 / 50,
        "elided_frac": 1 / 3,
        "rule_precision": 15 / 35,
        "rule_recall": 15 / 30,
        "first_error_hit_frac": 1 / 2,
    }


def test_nothing_is_said_of_what_did_not_happen() -> None:
    nothing = figures(seen(0, 10, cause="not_requested"))
    assert nothing["annotated"] == nothing["failed"] == nothing["spans"] == 0.0
    assert not [name for name in nothing if name.endswith("_frac") or "/" in name or name.startswith("rule_p")]
    late = figures(seen(0, 10, cause="timeout"))
    assert late["failed_frac"] == 1.0 and [name for name in late if name.endswith("_frac")] == ["failed_frac"]
    bare = figures(seen(0, 10, key(0, 5)))
    assert bare["empty_frac"] == bare["coverage_frac"] == bare["elided_frac"] == 0.0
    assert "spans_located_frac" not in bare and "cut_frac" not in bare


def test_reading_starts_anew() -> None:
    audit = AnnotationAudit()
    for item in STEP:
        audit.count(item)
    assert audit.read()["annotation/annotated"] == 3.0
    assert audit.read() == AnnotationAudit().read()


def test_order_of_arrival_does_not_change_a_digit() -> None:
    """Shares of 1/3, 1/7 ... of a response: sums from left to right differ in the last bits."""
    items = [seen(n, n, key(0, 1), tokens_before_cap=1.0, tokens_after_cap=1.0) for n in range(3, 200)]
    shares = [1 / n for n in range(3, 200)]
    assert sum(shares) != sum(reversed(shares))
    expected = figures(*items)
    generator = random.Random(0)
    for _ in range(5):
        generator.shuffle(items)
        assert figures(*items) == expected


def test_threads_count_together() -> None:
    audit = AnnotationAudit()
    threads = [threading.Thread(target=lambda: [audit.count(SECOND) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    total = 0.0
    while any(thread.is_alive() for thread in threads):
        total += audit.read()["annotation/annotated"]
    for thread in threads:
        thread.join()
    assert total + audit.read()["annotation/annotated"] == 2000.0


def test_agreement_with_the_rule_is_counted_by_token() -> None:
    """Found 0..4, the rule 2..5: tokens 2 and 3 agree."""
    assert rule_audit([error(0, 4)], [error(2, 5)], 10, "error") == {
        "rule_compared": 1.0,
        "rule_tp": 2.0,
        "rule_fp": 2.0,
        "rule_fn": 1.0,
        "rule_has_error": 1.0,
        "first_error_hit": 1.0,
    }
    missed = rule_audit([], [error(2, 5)], 10, "error")
    assert missed["first_error_hit"] == 0.0 and missed["rule_has_error"] == 1.0
    right = rule_audit([key(0, 4)], [key(2, 5)], 10, "key")
    assert right["rule_tp"] == 2.0 and right["rule_has_error"] == right["first_error_hit"] == 0.0


def test_a_rule_that_knows_no_mistake_is_no_witness() -> None:
    assert rule_audit([error(0, 4)], [], 10, "error") == rule_audit([], [], 10, "key") == {"rule_silent": 1.0}
    metrics = figures(seen(0, 10, error(0, 4), **rule_audit([error(0, 4)], [], 10, "error")))
    assert metrics["rule_silent"] == 1.0 and metrics["rule_compared"] == 0.0 and "rule_precision" not in metrics


def empties(value: float) -> Mapping[str, float]:
    return {"annotation/annotated": 8.0, "annotation/empty_frac": value}


def warned(settings: Audit, *steps: Mapping[str, float]) -> list[int]:
    """Indices of the steps that bring a warning."""
    watch = AuditWatch(settings)
    return [index for index, metrics in enumerate(steps) if watch.observe(metrics)]


def test_a_limit_counts_once_it_is_passed_in_so_many_steps_in_a_row() -> None:
    settings = Audit(for_steps=3, max_empty_frac=0.5)
    high, low, exact, none = empties(0.6), empties(0.1), empties(0.5), {"annotation/annotated": 0.0}
    assert warned(settings, high, high, high) == [2]
    assert warned(settings, high, high, low, high, high) == []
    assert warned(settings, exact, exact, exact, exact) == []  # not above
    assert warned(settings, *[high] * 9) == [2]  # said once
    assert warned(settings, *[high] * 4, low, *[high] * 3) == [2, 7]  # and again after it was well in between
    assert warned(settings, high, none, high, none, high) == [4]  # steps without annotations do not count


def test_a_warning_says_what_was_found_the_limit_and_what_to_do() -> None:
    watch = AuditWatch(Audit(for_steps=2, max_empty_frac=0.5))
    assert watch.observe(empties(0.6)) == []
    assert watch.observe(empties(0.625)) == [
        "62.5% of the annotated rollouts have no span at this step, and for 2 steps in a row more than "
        "annotator.audit.max_empty_frac = 0.5; read some of their answers; a stronger annotator or a larger "
        "annotator.backend.max_reply_tokens may help."
    ]


@pytest.mark.parametrize(
    ("metric", "setting"),
    [
        ("failed_frac", "max_failed_frac"),
        ("empty_frac", "max_empty_frac"),
        ("out_of_range_frac", "max_out_of_range_frac"),
        ("unknown_types_frac", "max_unknown_type_frac"),
        ("cut_frac", "max_cut_frac"),
    ],
)
def test_each_limit_watches_its_own_figure(metric: str, setting: str) -> None:
    settings = Audit(for_steps=1, **{setting: 0.3})
    (warning,) = AuditWatch(settings).observe({f"annotation/{metric}": 0.31})
    assert f"annotator.audit.{setting} = 0.3" in warning and warning.count(". ") == 0 and warning.endswith(".")
    assert AuditWatch(settings).observe({f"annotation/{metric}": 0.3}) == []
    others = {f"annotation/{name}": 1.0 for name in ("coverage_frac", "elided_frac", "spans_located_frac")}
    assert AuditWatch(settings).observe(others) == []


def test_every_setting_of_the_audit_that_is_a_limit_is_watched() -> None:
    limits = [name for name in Audit.model_fields if name.startswith("max_")]
    sentences = AuditWatch(Audit(for_steps=1)).observe(
        {f"annotation/{name}_frac": 1.0 for name in ("failed", "empty", "out_of_range", "unknown_types", "cut")}
    )
    assert len(limits) == len(sentences)
    assert all(any(limit in sentence for sentence in sentences) for limit in limits)


def test_a_mask_that_does_not_lead_back_is_reported_at_once() -> None:
    steps = [{"annotation/round_trip_errors": float(count)} for count in (0, 2, 1, 0, 1)]
    assert warned(Audit(for_steps=5), *steps) == [1, 4]
    (warning,) = AuditWatch(Audit()).observe(steps[1])
    assert warning.startswith("2 spans of this step do not lead from their text back to their tokens")


def test_figures_and_watch_speak_of_the_same_names() -> None:
    """What a bad step counts is what the watch reads."""
    bad = [seen(n, 10, cause="refused") for n in range(2)] + [
        seen(n, 10, out_of_range=1.0, spans_before_cap=1.0, unknown_types=1.0, tokens_before_cap=8.0) for n in range(2)
    ]
    metrics = {f"annotation/{name}": value for name, value in figures(*bad).items()}
    watch = AuditWatch(Audit())
    assert [len(watch.observe(metrics)) for _ in range(4)] == [0, 0, 5, 0]
    assert len(list(itertools.chain(*(watch.observe(metrics) for _ in range(4))))) == 0
