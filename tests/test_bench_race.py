"""The race's bookkeeping; the race itself is `make race`."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trace_rl.tasks.arithmetic import base_model_path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
race = pytest.importorskip("race")
widened = pytest.importorskip("widened")


def side(step_s: float, *accuracies: float) -> dict[str, object]:
    curve = [{"step": 10.0 * n, "train_s": 10 * n * step_s, "accuracy": a} for n, a in enumerate(accuracies)]
    return {"seconds": [9.0, step_s, step_s], "step_s": step_s, "curve": curve, "peak_gib": 1.5, "wall_s": 100.0}


def test_the_first_step_does_not_count() -> None:
    assert race.Result([9.0, 2.0, 4.0, 3.0], [], 1.0, 20.0, {}).step_s == 3.0


def test_seconds_to_an_accuracy() -> None:
    curve = side(2.0, 0.1, 0.3, 0.2, 0.5)["curve"]
    assert race.seconds_to(curve, 0.3) == 20.0
    assert race.seconds_to(curve, 0.4) == 60.0
    assert race.seconds_to(curve, 0.6) is None


def test_the_table_tells_ratio_and_time_to_the_accuracy_that_both_reach() -> None:
    report = {
        "command": "the command",
        "date": "2026-01-01",
        "code": "abc",
        "machine": {"cores": 2},
        "peer": {"trl": "1.16.0"},
        "threads": 2,
        "parameters": {"short": 520_000},
        "results": {
            "short": {"ours": side(2.0, 0.2, 0.4, 0.6), "trl": side(8.0, 0.2, 0.3, 0.4), "trl, 1 thread": side(16.0)}
        },
    }
    text = race.to_markdown(report)
    assert "| short | 8 x 8 of 64 tokens | 0.52 M | ours | 2.00 | 32.0 | 4.00 | 1.50 | 100 |" in text
    assert "| short | 8 x 8 of 64 tokens | 0.52 M | trl | 8.00 | 8.0 | 1.00 | 1.50 | 100 |" in text
    assert "| short | 8 x 8 of 64 tokens | 0.52 M | trl, 1 thread | 16.00 | 4.0 | 0.50 | 1.50 | 100 |" in text
    assert "- short: to an accuracy of 0.400: ours 20 s, trl 160 s" in text


def test_a_wide_model_writes_what_the_base_model_writes(tmp_path: Path) -> None:
    base = base_model_path()
    widened.widen(base, 400, tmp_path)
    narrow, wide = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (base, tmp_path))
    asked = torch.arange(2, 42)[None]
    torch.testing.assert_close(wide(asked).logits, narrow(asked).logits, atol=1e-4, rtol=1e-5)
    gained = 4 * 3 * 96 * (400 - 288)
    assert widened.num_parameters(tmp_path) == widened.num_parameters(base) + gained == wide.num_parameters()
    with pytest.raises(ValueError, match="288 neurons"):
        widened.widen(base, 288, tmp_path)
