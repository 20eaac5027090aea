"""The demo's configuration with a real model and real questions, both from installed packages."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(2400)]

CONFIGS = Path(str(resources.files("trace_rl.configs")))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Folder with a model and a file of questions."""
    from trace_rl.launch.real_model import convert_smollm2, write_gsm_symbolic

    folder = tmp_path_factory.mktemp("real")
    convert_smollm2(folder / "model")
    write_gsm_symbolic(folder / "gsm.jsonl", 128)
    return folder


def train(real, cwd, *overrides):
    """Metrics of a run of two steps, both corners of TRACE."""
    arguments = [CONFIGS / "demo.yaml", CONFIGS / "methods/trace_both.yaml", f"model.path={real / 'model'}"]
    arguments += [f"data.path={real / 'gsm.jsonl'}", "run.steps=2", "sampling.prompts_per_step=4", *overrides]
    command = [sys.executable, "-m", "trace_rl.launch.cli", "train", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=2200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (cwd / "runs/demo/metrics.jsonl").read_text().splitlines()]


def test_smollm2_annotates_what_it_has_written_itself(real, tmp_path):
    """By guided JSON on the run's own engine, while it samples; what its spans are worth is another question."""
    backend = "{type: self, max_prompt_tokens: 2048, max_reply_tokens: 160, max_spans: 3}"
    overrides = [f"annotator.backend={backend}", "evaluation.every=0", "sampling.samples_per_prompt=2"]
    steps = train(real, tmp_path, *overrides, "annotator.step_wait_s=300", "annotator.timeout_s=400")
    for record in steps:
        assert record["annotation/annotated"] == 8 and record["annotation/requests"] >= 8
        # guided by the schema; what it cannot say is that no span ends before it starts
        assert record["annotation/malformed_spans"] == record["annotation/unknown_types"] == 0
        assert record["annotation/round_trip_errors"] == record["annotation/failed"] == 0
        assert record["annotation/coverage_frac"] <= 0.25
    assert any(record["annotation/spans"] > 0 for record in steps)


def test_smollm2_trains_two_steps_on_gsm_symbolic(real, tmp_path):
    # This model answers almost nothing right, so GRPO alone would have no gradient; spans of wrong equations give one.
    records = train(real, tmp_path, "evaluation.num_prompts=8", "evaluation.samples_per_prompt=1")
    steps = [record for record in records if "reward/mean" in record]
    assert [record["step"] for record in steps] == [0, 1]
    assert all(record["mismatch/logprob_gap_max_nats"] <= 1e-4 for record in steps)
    # not every step has a wrong equation in its 32 responses
    assert any(record["route/error_spans/rows"] > 0 and record["learner/grad_norm"] > 0 for record in steps)
    assert records[-1]["heldout/samples"] == 8
