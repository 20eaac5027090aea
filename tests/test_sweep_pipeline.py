"""A sweep as a user runs it, with real cells: Ray, vLLM and DeepSpeed in each."""

import json
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import psutil
import pytest

from trace_rl.launch.sweep.record import FILE, read_states

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(900)]

CONFIGS = Path(str(resources.files("trace_rl.configs")))
SWEEP = """\
name: tiny
base:
  files: [{configs}/demo.yaml]
  overrides:
    run.checkpoint_every: 1
    learner.world_size: 1
    sampling: {{prompts_per_step: 4, samples_per_prompt: 4}}
    evaluation: {{every: 100, num_prompts: 4, samples_per_prompt: 1}}
    evaluation.sets: {{longer: {{task: {{min_steps: 7, max_steps: 8}}}}}}
    sampling.max_response_tokens: 192
axes:
  method:
    type: list
    variants:
      base: {{files: [{configs}/methods/grpo.yaml], overrides: {{run.steps: 0}}}}
      grpo: {{files: [{configs}/methods/grpo.yaml], overrides: {{run.steps: 12}}}}
seeds: [3]
report: {{metrics: [heldout/pass_at_1, eval/longer/pass_at_1]}}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trace_rl.launch.cli", "sweep", *arguments]


def test_a_killed_sweep_goes_on_with_the_checkpoint_of_its_running_cell(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(configs=CONFIGS))
    folder = tmp_path / "runs" / "tiny"
    second = folder / "grpo_seed-3"
    sweep = subprocess.Popen(
        command("run", "sweep.yaml"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 600
        while not (second / "checkpoints" / "step-000003" / "trainer.json").exists():
            assert sweep.poll() is None, sweep.stdout.read()
            assert time.monotonic() < deadline, f"no checkpoint: {(folder / FILE).read_text()}"
            time.sleep(0.05)
    finally:
        sweep.kill()
        sweep.communicate(timeout=30)
    states = read_states(folder)
    assert [states[name].status for name in ("base_seed-3", "grpo_seed-3")] == ["finished", "running"]
    orphan = int(states["grpo_seed-3"].note.split()[1])
    done = subprocess.run(command("run", "sweep.yaml"), cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("2 finished\n")
    assert "base_seed-3" not in done.stdout  # it was finished, and nothing happened to it
    assert not psutil.pid_exists(orphan)
    assert "resumed after" in (folder / "printed" / "grpo_seed-3.log").read_text()
    records = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "reward/mean" in record] == list(range(12))
    base = [json.loads(line) for line in (folder / "base_seed-3" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in base] == [0]
    assert base[0]["eval/longer/samples"] == 4
    text = subprocess.run(
        command("report", "sweep.yaml"), cwd=tmp_path, capture_output=True, text=True, timeout=60
    ).stdout
    assert "## eval/longer/pass_at_1" in text
    assert "| grpo | 1 |" in text
