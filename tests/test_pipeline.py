"""The whole pipeline as a user starts it: the command, the embedded model, and every part real."""

import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from safetensors.numpy import load_file

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CONFIGS = Path(str(resources.files("trace_rl.configs")))
SMALL = [
    "sampling.prompts_per_step=4",
    "sampling.samples_per_prompt=4",
    "evaluation.num_prompts=8",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=2",
    "logging.rollouts_every=1",
    "teacher.max_tokens_per_batch=512",  # prompts are scored one by one, while others are sampled
]


def trace_rl(*arguments, cwd, check=True):
    command = [sys.executable, "-m", "trace_rl.launch.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def read_metrics(folder):
    """Records without times, in order."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in record.items()
            if not name.endswith("_s") and not name.startswith(("idle/", "memory/"))
        }
        for record in records
    ]


def steps_of(records):
    return [record for record in records if "reward/mean" in record]


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "hf" / "model.safetensors")


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value == theirs[name]).all(), name


@pytest.fixture(scope="module")
def trace_run(tmp_path_factory):
    """Four steps of TRACE-FKL with a checkpoint in the middle."""
    cwd = tmp_path_factory.mktemp("trace")
    done = trace_rl("train", CONFIGS / "demo.yaml", *SMALL, "run.steps=4", "run.checkpoint_every=2", cwd=cwd)
    return cwd / "runs" / "demo", done.stdout


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("grpo")
    trace_rl("train", CONFIGS / "demo.yaml", CONFIGS / "methods/grpo.yaml", *SMALL, "run.steps=2", cwd=cwd)
    return cwd / "runs" / "demo"


def test_learner_and_sampler_agree_at_every_step(trace_run):
    folder, _ = trace_run
    steps = steps_of(read_metrics(folder))
    assert [record["step"] for record in steps] == [0, 1, 2, 3]
    for record in steps:
        assert record["mismatch/logprob_gap_max_nats"] <= 1e-4
        assert record["sync/canary_gap_max_nats"] <= 1e-3


def test_spans_are_routed_under_the_cap_and_taught(trace_run):
    folder, _ = trace_run
    steps = steps_of(read_metrics(folder))
    assert any(record["route/key_spans/rows"] > 0 and record["loss/routed"] > 0 for record in steps)
    for step in range(4):
        for line in (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines():
            rollout = json.loads(line)
            routed = [position for route in rollout["routes"] for position in route["positions"]]
            assert len(routed) <= 0.25 * len(rollout["token_ids"])
            assert not routed or rollout["reward"] == 1
            assert rollout["token_versions"] == [[step, len(rollout["token_ids"])]]


def test_what_one_sees(trace_run):
    folder, printed = trace_run
    assert "step 4/4" in printed
    assert "held-out after 0 steps" in printed
    assert "pass@1 after 4 steps" in (folder / "summary.md").read_text()
    assert (folder / "config.yaml").is_file()
    assert (folder / "run.log").is_file()


@pytest.mark.slow  # as is a run without kills beside those with some in `make test-kills`
def test_one_seed_gives_one_run(trace_run, tmp_path):
    folder, _ = trace_run
    trace_rl("train", folder / "config.yaml", cwd=tmp_path)
    again = tmp_path / "runs" / "demo"
    assert read_metrics(again) == read_metrics(folder)
    assert_same_weights(weights(again, 4), weights(folder, 4))


def test_a_resumed_run_is_the_uninterrupted_one(trace_run, tmp_path):
    folder, _ = trace_run
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000004")
    done = trace_rl("train", folder / "config.yaml", "run.resume=auto", cwd=tmp_path)
    assert "resumed after 2 steps" in done.stdout
    assert read_metrics(copy) == read_metrics(folder)
    assert_same_weights(weights(copy, 4), weights(folder, 4))


def test_lambda_zero_is_grpo_bit_for_bit(grpo_run, tmp_path):
    off = "algorithm.routes.key_spans.schedule.initial=0"
    trace_rl("train", CONFIGS / "demo.yaml", *SMALL, "run.steps=2", off, cwd=tmp_path)
    folder = tmp_path / "runs" / "demo"
    assert_same_weights(weights(folder, 2), weights(grpo_run, 2))
    for ours, theirs in zip(read_metrics(folder), read_metrics(grpo_run), strict=True):
        assert {name: ours[name] for name in theirs} == theirs


def test_the_checkpoint_loads_in_transformers(trace_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trace_run[0] / "checkpoints" / "step-000004" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000


def test_a_method_of_ones_own_trains_without_a_change_anywhere(tmp_path):
    """The example at the end of docs/methods.md, from the working folder: workers import it too."""
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    python, yaml = re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL)
    (tmp_path / "hellinger.py").write_text(python)
    (tmp_path / "hellinger.yaml").write_text(yaml)
    trace_rl(
        "train", CONFIGS / "demo.yaml", "hellinger.yaml", *SMALL, "run.steps=2", "evaluation.every=0", cwd=tmp_path
    )
    steps = steps_of(read_metrics(tmp_path / "runs" / "demo"))
    assert any(record["route/key_spans/rows"] > 0 and record["loss/routed"] > 0 for record in steps)
    assert all(record["route/key_spans/value_max_nats"] <= 1 for record in steps)
    root = Path(__file__).parent.parent
    files = [file for floor in ("trace", "workers", "launch") for file in (root / floor).rglob("*.py")]
    assert len(files) > 50
    assert not any("hellinger" in file.read_text(encoding="utf-8").lower() for file in files)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run.stepz=3"], "unknown key run.stepz; did you mean 'steps'?"),
        (["data.path=missing.jsonl"], "data file missing.jsonl does not exist"),
        (["sampling.max_prompt_tokens=5"], "sampling.max_prompt_tokens is 5"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(arguments, sentence, tmp_path):
    done = trace_rl("train", CONFIGS / "demo.yaml", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
