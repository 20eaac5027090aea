"""The benchmark of the driver, over two engines and few rollouts."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
driver_overhead = pytest.importorskip("driver_overhead")
fake_roles = pytest.importorskip("fake_roles")


@pytest.mark.engine
def test_all_cpu_time_of_the_driver_belongs_to_a_part(local_ray: None) -> None:
    actors = fake_roles.quick_actors()
    pace = driver_overhead.Pace(median_tokens=20, sigma=0.3, max_concurrent=16, seconds_per_token=0.005)
    engines = fake_roles.start_engines(2, pace)
    config = driver_overhead.configured(prompts=4, samples=4, steps=3)
    started = time.process_time()
    found = driver_overhead.measure(config, engines, actors, fake_roles.CharTokenizer())
    used_ms = (time.process_time() - started) * 1e3
    assert found["engines"] == 2
    assert found["trained"] == 3 * 16
    assert found["length_mean_tokens"] == pytest.approx(20, rel=0.3)
    assert len(found["cpu_ms_per_rollout_of_steps"]) == 2  # the first is the warm-up
    assert found["peak_memory_mib"] > 50
    parts = found["parts_ms_per_rollout"]
    assert set(parts) == set(driver_overhead.PARTS)
    assert 0 < sum(parts.values()) * 3 * 16 <= used_ms
    assert parts["training batch"] > 0
    assert parts["prompts of the teacher"] > 0


def test_the_time_of_a_thread_is_booked_for_what_it_does() -> None:
    meter = driver_overhead.Meter()
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            sum(range(1000))

    with meter.watching():
        worker = threading.Thread(target=work, name="feed the rewarder")
        worker.start()
        time.sleep(0.4)
        is_over.set()
        worker.join(10)
    parts = meter.parts(main_s=1.0, total_s=3.0)
    assert parts["receiving from engines"] > 0.02
    assert parts["metrics and journal"] == 1.0  # the main thread was in no stage
    assert parts["Ray's own threads"] == pytest.approx(2.0 - parts["receiving from engines"])


@pytest.mark.parametrize(("cpu_ms", "verdict"), [(0.8, "within the bound"), (1.2, "ABOVE the bound")])
def test_the_report_says_whether_the_bound_is_kept_with_most_engines(cpu_ms: float, verdict: str) -> None:
    def result(engines: int, cpu: float) -> dict[str, Any]:
        return {
            "engines": engines,
            "cpu_ms_per_rollout": cpu,
            "cpu_ms_per_rollout_of_steps": [cpu, cpu],
            "wall_s_per_step": 1.0,
            "parts_ms_per_rollout": dict.fromkeys(driver_overhead.PARTS, 0.1),
            "peak_memory_mib": 100.0,
            "length_mean_tokens": 200.0,
        }

    report = {
        "command": "c",
        "machine": {"cores": 2},
        "date": "d",
        "load": 1.0,
        "rollouts_per_step": 10,
        "num_steps": 2,
        "idle_memory_mib": 50.0,
        "results": [result(1, 0.5), result(64, cpu_ms)],
    }
    text = driver_overhead.to_markdown(report)
    assert f"**{cpu_ms:.2f} ms** of the driver's CPU time, {verdict}" in text
    assert "| 64 | " in text
