"""The three-symptom watch: all three make a collapse, any two do not, and recorded metrics give the same verdict."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence

import pytest
from pydantic import ValidationError

from trace_rl.collapse import CollapseDetector, Verdict
from trace_rl.config.watch import CollapseWatch

ALL = ("entropy_rise", "length_drop", "heldout_drop")
SMALL = CollapseWatch(window=2)
Record = Mapping[str, float]


def step(number: int, entropy: float, length: float) -> Record:
    return {"step": number, "policy/entropy_nats": entropy, "response/length_mean_tokens": length, "time/step_s": 1.0}


def evaluation(number: int, pass_at_1: float) -> Record:
    return {"step": number, "heldout/pass_at_1": pass_at_1, "heldout/samples": 64.0}


def run(records: Sequence[Record], settings: CollapseWatch = SMALL) -> tuple[CollapseDetector, list[Verdict]]:
    """A detector that saw the records one by one, and its verdicts."""
    detector, verdicts = CollapseDetector(settings), []
    for record in records:
        if "heldout/pass_at_1" in record:
            verdicts.append(detector.observe_evaluation(int(record["step"]), record))
        else:
            detector.observe_step(int(record["step"]), record)
    return detector, verdicts


def history(entropy: Sequence[float], length: Sequence[float], heldout: Sequence[float]) -> list[Record]:
    """Steps, with evaluations spread evenly over them from before the first to after the last."""
    steps = [step(number, *values) for number, values in enumerate(zip(entropy, length, strict=True))]
    every = len(steps) // (len(heldout) - 1)
    records: list[Record] = []
    for number, value in enumerate(heldout):
        records += [evaluation(number * every, value), *steps[number * every : (number + 1) * every]]
    return records


# Means of the first two and the last two steps: entropy 0.3 -> 0.6 nats, length 200 -> 100 tokens; pass@1 from its best
# 0.6 to 0.5.
ENTROPY = (0.2, 0.4, 0.9, 0.1, 0.5, 0.7)
LENGTH = (190.0, 210.0, 500.0, 10.0, 110.0, 90.0)
HELDOUT = (0.4, 0.6, 0.55, 0.5)
STEADY = {"entropy": (0.3,) * 6, "length": (200.0,) * 6, "heldout": (0.4, 0.5, 0.6, 0.6)}
COLLAPSING = {"entropy": ENTROPY, "length": LENGTH, "heldout": HELDOUT}


def test_the_three_together_are_a_collapse() -> None:
    detector, verdicts = run(history(ENTROPY, LENGTH, HELDOUT))
    assert [verdict.is_collapse for verdict in verdicts] == [False, False, False, True]
    assert verdicts[-1].symptoms == ALL
    assert verdicts[-1].sentence == (
        "After 6 steps the run shows all three symptoms of a collapse under the teacher (arXiv:2605.10194): student "
        "entropy 0.300 -> 0.600 nats, response length 200.0 -> 100.0 tokens, held-out pass@1 60.0% (best) -> 50.0% "
        "(means over the first and the last 2 steps); lower the KL weight, narrow the selector or end the schedule "
        "earlier; metrics.jsonl has the curves."
    )
    assert detector.metrics() == pytest.approx(
        {"collapse/entropy_ratio": 2.0, "collapse/length_ratio": 0.5, "collapse/heldout_drop": 0.1}
    )


@pytest.mark.parametrize("steady", list(STEADY))
def test_any_two_of_the_three_are_not(steady: str) -> None:
    _, verdicts = run(history(**{**COLLAPSING, steady: STEADY[steady]}))
    expected = tuple(name for name in ALL if not name.startswith(steady))
    assert verdicts[-1].symptoms == expected
    assert not verdicts[-1].is_collapse
    assert "2 of 3 symptoms" in verdicts[-1].sentence
    assert "lower the KL weight" not in verdicts[-1].sentence


def test_a_run_that_learns_shows_nothing() -> None:
    # what policy gradients do: entropy falls, lengths halve early, accuracy rises with a dip of 4 points
    entropy = [0.8 / (1 + 0.1 * number) for number in range(60)]
    length = [200.0 - 1.5 * min(number, 30) for number in range(60)]
    _, verdicts = run(history(entropy, length, (0.3, 0.5, 0.46, 0.6)), CollapseWatch())
    assert all(verdict.symptoms == () for verdict in verdicts)


def test_early_noise_is_not_judged() -> None:
    # window 10: steps 0-18 swing wildly, and 19 steps are one too few to compare two windows
    settings = CollapseWatch()
    records = [evaluation(0, 0.9), *(step(number, 10.0**number, 1000.0 - 50 * number) for number in range(19))]
    detector, verdicts = run([*records, evaluation(19, 0.1)], settings)
    assert verdicts[-1].symptoms == ("heldout_drop",)
    assert detector.metrics() == pytest.approx({"collapse/heldout_drop": 0.8})
    assert "entropy" not in verdicts[-1].sentence
    _, verdicts = run([*records, step(19, 10.0**19, 50.0), evaluation(20, 0.1)], settings)
    assert verdicts[-1].is_collapse


def test_single_outliers_are_averaged_away() -> None:
    # one step of ten at five times the entropy and a tenth of the length: means 0.3 (1 + 0.4) and 200 (1 - 0.09)
    entropy, length = [0.3] * 20, [200.0] * 20
    entropy[15], length[15] = 1.5, 20.0
    detector, verdicts = run(history(entropy, length, (0.6, 0.4)), CollapseWatch())
    assert verdicts[-1].symptoms == ("heldout_drop",)
    assert detector.metrics()["collapse/entropy_ratio"] == pytest.approx(1.4)
    assert detector.metrics()["collapse/length_ratio"] == pytest.approx(0.91)


def test_changes_of_exactly_the_threshold_are_no_symptoms() -> None:
    # 0.36 -> 0.54 is +50 %, 200 -> 140 is -30 %, 0.65 -> 0.60 is 5 points, none of which is exact in binary
    _, verdicts = run(history((0.36, 0.36, 0.54, 0.54), (200.0, 200.0, 140.0, 140.0), (0.65, 0.60)))
    assert verdicts[-1].symptoms == ()
    _, verdicts = run(history((0.36, 0.36, 0.541, 0.541), (200.0, 200.0, 139.0, 139.0), (0.65, 0.599)))
    assert verdicts[-1].symptoms == ALL


@pytest.mark.parametrize("cut", range(len(history(**COLLAPSING))))
def test_recorded_metrics_rebuild_the_state(cut: int) -> None:
    records = history(**COLLAPSING)
    online, verdicts = run(records)
    resumed = CollapseDetector(SMALL)
    resumed.feed(json.loads(json.dumps(record)) for record in records[:cut])
    later = []
    for record in records[cut:]:
        if "heldout/pass_at_1" in record:
            later.append(resumed.observe_evaluation(int(record["step"]), record))
        else:
            resumed.observe_step(int(record["step"]), record)
    assert later == verdicts[len(verdicts) - len(later) :]
    assert resumed.metrics() == online.metrics()


def test_what_is_fed_twice_counts_once() -> None:
    records = history(**COLLAPSING)
    once, twice = CollapseDetector(SMALL), CollapseDetector(SMALL)
    once.feed(records)
    twice.feed(itertools.chain.from_iterable((record, record) for record in records))
    assert twice.metrics() == once.metrics()


def test_missing_and_non_finite_metrics_are_ignored() -> None:
    detector = CollapseDetector(SMALL)
    assert detector.metrics() == {}
    verdict = detector.observe_evaluation(0, {"heldout/samples": 8.0})
    assert verdict == Verdict((), False, "After 0 steps the run shows 0 of 3 symptoms of a collapse.")
    detector.observe_step(0, {"loss/total": 1.0})
    for number, (entropy, length) in enumerate(
        [(0.3, math.nan), (math.inf, 200.0), (0.3, 200.0), (0.6, 50.0)], start=1
    ):
        detector.observe_step(number, step(number, entropy, length))
    assert detector.metrics() == {}  # three values of each, and two windows need four
    detector.observe_step(5, step(5, 0.6, 50.0))
    # entropy 0.3, 0.3 | 0.6, 0.6 and length 200, 200 | 50, 50
    assert detector.metrics() == pytest.approx({"collapse/entropy_ratio": 2.0, "collapse/length_ratio": 0.25})


def test_a_reference_of_zero_has_no_ratio() -> None:
    rising = history((0.0, 0.0, 0.1, 0.1), (200.0, 200.0, 100.0, 100.0), (0.6, 0.5))
    detector, verdicts = run(rising)
    assert verdicts[-1].symptoms == ALL
    assert "collapse/entropy_ratio" not in detector.metrics()
    _, verdicts = run(history((0.0,) * 4, (0.0,) * 4, (0.6, 0.5)))
    assert verdicts[-1].symptoms == ("heldout_drop",)


def test_thresholds_are_settings() -> None:
    records = history((0.3, 0.3, 0.36, 0.36), (200.0, 200.0, 170.0, 170.0), (0.62, 0.60))  # +20 %, -15 %, 2 points
    _, verdicts = run(records)
    assert verdicts[-1].symptoms == ()
    tight = CollapseWatch(window=2, entropy_rise_frac=0.1, length_drop_frac=0.1, heldout_drop=0.01)
    _, verdicts = run(records, tight)
    assert verdicts[-1].is_collapse


@pytest.mark.parametrize(
    "settings",
    [
        {"action": "panic"},
        {"window": 0},
        {"entropy_rise_frac": 0},
        {"length_drop_frac": 1},
        {"heldout_drop": 0},
        {"entropy": 1},
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CollapseWatch.model_validate(settings)
