"""The demo's configuration with a real model and real questions, both from installed packages."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(2400)]

CONFIGS = Path(str(resources.files("trace_rl.configs")))


def test_smollm2_trains_two_steps_on_gsm_symbolic(tmp_path):
    from trace_rl.launch.real_model import convert_smollm2, write_gsm_symbolic

    convert_smollm2(tmp_path / "model")
    write_gsm_symbolic(tmp_path / "gsm.jsonl", 128)
    # This model answers almost nothing right, so GRPO alone would have no gradient; spans of wrong equations give one.
    arguments = [
        CONFIGS / "demo.yaml",
        CONFIGS / "methods/trace_both.yaml",
        f"model.path={tmp_path / 'model'}",
        f"data.path={tmp_path / 'gsm.jsonl'}",
        "run.steps=2",
        "sampling.prompts_per_step=4",
        "evaluation.num_prompts=8",
        "evaluation.samples_per_prompt=1",
    ]
    command = [sys.executable, "-m", "trace_rl.launch.cli", "train", *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=2200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "reward/mean" in record]
    assert [record["step"] for record in steps] == [0, 1]
    assert all(record["mismatch/logprob_gap_max_nats"] <= 1e-4 for record in steps)
    # not every step has a wrong equation in its 32 responses
    assert any(record["route/error_spans/rows"] > 0 and record["learner/grad_norm"] > 0 for record in steps)
    assert records[-1]["heldout/samples"] == 8
