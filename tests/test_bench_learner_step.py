"""The benchmark of the learner's step at the demo's size: its report is complete, and its check can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "learner_step.py"

pytestmark = pytest.mark.engine


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=False, cwd=SCRIPT.parent
    )


@pytest.mark.slow
def test_every_share_is_measured_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    done = run(str(SCRIPT), "--repeats", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "learner_step_demo.json").read_text())
    found = report["result"]
    assert 0 <= found["errors"]["padded"] <= 1e-4
    assert 0 <= found["errors"]["shared"] <= 1e-4
    assert [row["share"] for row in found["results"]] == 2 * [0.0, 0.05, 0.1, 0.25, 1.0]
    assert found["results"][0]["ratio"] == 1.0
    for row in found["results"]:
        assert row["seconds"] > 0 and row["tokens_per_s"] > 0 and 0 < row["roof_frac"] < 1
        assert 0 <= row["padding_frac"] <= 0.06
    text = (tmp_path / "learner_step_demo.md").read_text()
    assert text.count("| padded |") == text.count("| shared |") == 5 and report["command"] in text
    if not report["machine"]["has_gpu"]:
        assert "not yet measured: gpu-0.6b (no GPU)" in text


def test_a_wrong_gradient_stops_it() -> None:
    broken = (
        "import learner_step as bench; exact = bench.exact_norm; "
        "bench.exact_norm = lambda *arguments: 1.001 * exact(*arguments); "
        "bench.environment.apply(); bench.run_preset(bench.PRESETS['demo'], 1, 0)"
    )
    done = run("-c", broken)
    assert done.returncode == 1 and "the gradient norm of padded sequences is off by" in done.stderr
