"""The engine that sleeps, and the benchmark of scheduling over a few such engines."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trace_rl.batch import Cancelled, Prompt, Rollout, RolloutKey, RolloutRequest
from trace_rl.errors import WeightSyncError
from trace_rl.protocols import Decoding

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.append(BENCHMARKS)
sleeping_engine = pytest.importorskip("sleeping_engine")
straggler_trace = pytest.importorskip("straggler_trace")

TOKENS = 20
DECODING = Decoding(1.0)


def requests(count: int) -> list[RolloutRequest]:
    return [RolloutRequest(Prompt(f"p{number}", "q", "4"), 0, (7,), seed=number) for number in range(count)]


def engine(**pace: Any) -> Any:
    """All completions have 20 tokens; a token takes 10 ms."""
    settings = {"median_tokens": TOKENS, "sigma": 0.0, "max_concurrent": 2, "seconds_per_token": 0.01, **pace}
    made = sleeping_engine.SleepingEngine(0, sleeping_engine.Pace(**settings))
    made.accept(0)
    return made


def timed(chunks: Iterator[list[Any]]) -> list[tuple[float, Any]]:
    started = time.monotonic()
    return [(time.monotonic() - started, item) for chunk in chunks for item in chunk]


def test_a_full_batch_lets_the_others_wait() -> None:
    found = timed(engine().generate(requests(3), DECODING, 100))
    assert [item.prompt.prompt_id for _, item in found] == ["p0", "p1", "p2"]
    # two places of 0.2 s each: the third completion begins when they are free
    assert [round(at, 1) >= limit for (at, _), limit in zip(found, (0.2, 0.2, 0.4), strict=True)] == [True] * 3
    assert found[1][0] < 0.4 <= found[2][0] + 1e-3


def test_a_full_batch_may_be_slower() -> None:
    # two completions with a step of 10 ms x (1 + 1): 0.4 s
    assert timed(engine(crowding=1.0).generate(requests(2), DECODING, 100))[0][0] >= 0.4 - 1e-3


def test_tokens_carry_the_version_that_was_accepted_when_they_were_written() -> None:
    slow = engine()
    found: list[tuple[float, Any]] = []
    receiving = threading.Thread(target=lambda: found.extend(timed(slow.generate(requests(1), DECODING, 100))))
    receiving.start()
    time.sleep(0.08)
    slow.receive_weights(0.1)
    slow.accept(1)
    receiving.join(10)
    ((took, rollout),) = found
    versions = rollout.token_versions
    assert len(versions) == len(rollout.token_ids) == len(rollout.rollout_logprobs) == TOKENS
    assert set(versions) == {0, 1}
    assert (np.diff(versions) >= 0).all()
    assert took >= 0.3 - 1e-3  # 20 tokens, and 0.1 s in which the engine stood still


def test_new_weights_have_to_read_what_is_written() -> None:
    # one token in 10 ms; after about 10 of 20, each costs another 20 ms to read: 0.2 s + 0.2 s
    slow = engine(reread_seconds_per_token=0.02)
    found: list[tuple[float, Any]] = []
    receiving = threading.Thread(target=lambda: found.extend(timed(slow.generate(requests(1), DECODING, 100))))
    receiving.start()
    time.sleep(0.1)
    slow.receive_weights(0.0)
    slow.accept(1)
    receiving.join(10)
    assert found[0][0] >= 0.3


def test_what_is_cancelled_is_gone_at_once_and_its_place_is_free() -> None:
    slow = engine(max_concurrent=1, seconds_per_token=0.02)
    chunks = slow.generate(requests(2), DECODING, 100)
    threading.Timer(0.05, slow.cancel, [[RolloutKey("p0", 0)]]).start()
    (first_at, first), (second_at, second) = timed(chunks)
    assert first == Cancelled(RolloutKey("p0", 0))
    assert first_at < 0.3  # not the 0.4 s of a whole completion
    assert isinstance(second, Rollout)
    assert second.prompt.prompt_id == "p1"
    assert second_at < 0.7  # not 0.8 s, after a whole one


def test_an_engine_refuses_work_while_its_weights_are_unproven() -> None:
    with pytest.raises(WeightSyncError, match="unproven"):
        next(sleeping_engine.SleepingEngine(0, sleeping_engine.Pace(1, 0, 1, 0.01)).generate([], DECODING, 1))


def test_weights_that_must_not_come_while_completions_are_written_are_refused() -> None:
    strict = engine(runs_through_syncs=False)
    threading.Thread(target=lambda: list(strict.generate(requests(1), DECODING, 100)), daemon=True).start()
    time.sleep(0.05)
    with pytest.raises(WeightSyncError, match="while 1 completions were written"):
        strict.receive_weights(0.0)


def test_lengths_are_log_normal_those_of_prompt_and_sample_and_cut() -> None:
    pace = sleeping_engine.Pace(median_tokens=100, sigma=1.0, max_concurrent=1, seconds_per_token=0.0)
    keys = [RolloutKey("p", sample) for sample in range(4000)]
    lengths = [sleeping_engine.length_of(key, pace, 2000) for key in keys]
    assert lengths == [sleeping_engine.length_of(key, pace, 2000) for key in keys]
    assert np.median(lengths) == pytest.approx(100, rel=0.1)
    assert np.percentile(lengths, 99) == pytest.approx(100 * np.exp(2.326), rel=0.2)
    assert max(lengths) == 2000
    (cut,) = [item for _, item in timed(engine().generate(requests(1), DECODING, TOKENS))]
    assert cut.finish_reason == "length"


def test_an_engine_needs_neither_torch_nor_vllm() -> None:
    code = "import sys, sleeping_engine; sys.exit(bool({'torch', 'vllm', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, timeout=60, check=False).returncode == 0


@pytest.fixture(scope="module")
def cluster(local_ray: None) -> Any:
    setting = straggler_trace.Setting(
        prompts=2, samples=2, num_engines=2, max_concurrent=2, median_tokens=16, max_tokens=64, sync_s=0.0
    )
    return straggler_trace.start_cluster(setting)


@pytest.mark.engine
@pytest.mark.parametrize("mode", list(straggler_trace.MODES))
def test_a_mode_keeps_its_bound_and_loses_nothing_unless_it_drops(cluster: Any, mode: str) -> None:
    found = straggler_trace.measure(mode, cluster, learner_s=0.01, steps=3)
    scheduling = straggler_trace.MODES[mode]
    bound = scheduling.get("max_staleness", 0)
    assert found["rollouts_per_s"] > 0
    assert found["staleness_max"] <= bound
    assert len(found["staleness_frac"]) == bound + 1
    assert sum(found["staleness_frac"]) == pytest.approx(1)
    assert all(0 <= found[name] <= 1 for name in found if name.endswith("_frac") and name != "staleness_frac")
    if scheduling.get("late") != "drop":
        assert found["dropped_frac"] == 0
        assert found["trained_length_tokens"] == found["sampled_length_tokens"]
    if "oversampling_frac" in scheduling:  # of 2 + 1 prompts a step, one is given up
        assert found["dropped_frac"] == pytest.approx(1 / 3)


def test_gains_are_set_against_the_best_that_overlap_could_give() -> None:
    """Sampling 3 s and learning 1 s: overlap hides the 1 s at best, 4 / 3."""
    figures = {mode: {"rollouts_per_s": 20.0} for mode in straggler_trace.OVER_RATIOS}
    figures[straggler_trace.SYNC] = {"rollouts_per_s": 10.0, "rollout_s": 3.0, "learner_s": 1.0}
    row = straggler_trace.ratio_row(figures)
    assert row["best_of_overlap"] == pytest.approx(4 / 3)
    assert row["gains"]["one step off"] == 2
    assert row["gains"][straggler_trace.SYNC] == 1
