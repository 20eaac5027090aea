"""What the tests of the pages share: rollouts of a run that never ran, and run folders with its metrics."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_rl.launch.pages.records import RolloutRecord
from trace_rl.launch.pages.view import Source

WORDS = (
    " the",
    " sum",
    " of",
    " 20",
    " -",
    " 7",
    " =",
    " 13",
    "\n",
    "Step",
    " 1",
    ":",
    " carry",
    "\\boxed{",
    "}",
    " 漢",
)
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 2'>",
    '<a href="javascript:window.hacked = 3">click</a>',
    "<!--<script>",
    "\u202eright to left\u202c",
    "\u05e9\u05dc\u05d5\u05dd",
    "nul\x00byte",
    "{{window.hacked = 4}}${window.hacked = 5}",
    "<style>*{display:none}</style>",
    "\u2028\u2029\ufeff\ud83d\ude00",
)


def record(sample: int, count: int, num_words: int, seed: int = 0, **changes: Any) -> RolloutRecord:
    """A measured rollout of `count` tokens, of which every tenth stretch of eight takes a route."""
    random = np.random.default_rng([seed, sample])
    reward = float(sample % 2 == 0)
    kind = "key" if reward else "error"
    spans = [(start, min(start + 8, count)) for start in range(0, count, 80)]
    positions = [position for start, end in spans for position in range(start, end)]
    rows = len(positions)
    sampler = -random.exponential(0.3, count)

    def numbers(values: np.ndarray) -> list[float]:
        return [float(f"{value:.5g}") for value in values]

    def candidates() -> list[Any]:
        chosen = random.integers(0, num_words, (rows, 5))
        return [[[int(token), -0.2 - rank] for rank, token in enumerate(row)] for row in chosen]

    return RolloutRecord.model_validate_json(
        json.dumps(
            {
                "prompt_id": "sums/1",
                "sample": sample,
                "question": "Start with 20. Step 1: subtract 7.",
                "answer": "13",
                "response": "",
                "token_ids": [int(token) for token in random.integers(0, num_words, count)],
                "finish_reason": "stop",
                "reward": reward,
                "grade_cause": "graded",
                "advantage": 2 * reward - 1,
                "annotation_cause": "annotated",
                "spans": [
                    {"start": start, "end": end, "class": kind, "type": "arith", "importance": 1.0}
                    for start, end in spans
                ],
                "token_versions": [[3, count - count // 2], [4, count // 2]] if count > 1 else [[3, count]],
                "token_advantages": [2 * reward - 1] * count,
                "pg_weight": [0.0 if position in set(positions) else 1 / count for position in range(count)],
                "rollout_logprobs": numbers(sampler),
                "policy_logprobs": numbers(sampler + random.normal(0, 1e-3, count)),
                "policy_entropy": numbers(random.exponential(0.5, count)),
                "routes": [
                    {
                        "route": 0 if reward else 1,
                        "weight": 0.5,
                        "positions": positions,
                        "token_weights": [1 / rows] * rows,
                        "divergence": numbers(random.exponential(0.2, rows)),
                        "policy_logprobs": numbers(sampler[positions]),
                        "teacher_logprobs": numbers(-random.exponential(0.3, rows)),
                        "policy_candidates": candidates(),
                        "teacher_candidates": candidates(),
                    }
                ],
            }
            | changes
        )
    )


def source(records: Sequence[RolloutRecord], words: Sequence[str] = WORDS, run: str = "demo", step: int = 0) -> Source:
    return Source(run, step, ("key_spans", "error_spans"), tuple(records), lambda ids: [words[each] for each in ids])


def write_run(folder: Path, seed: int = 0, learning_rate: float = 1e-3, steps: int = 6, **metrics: float) -> Path:
    """A run folder whose reward is `seed` + step and whose held-out accuracy is half at first and then seed / 10."""
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = [{"step": 0, "heldout/pass_at_1": 0.5, "heldout/samples": 8.0}]
    for step in range(steps):
        lines.append(
            {
                "step": step,
                "reward/mean": float(seed + step),
                "policy/entropy_nats": 0.5,
                "response/length_mean_tokens": 30.0,
                "annotation/coverage_frac": 0.125,
                "annotation/types/arith": 3.0,
                "annotation/types/copy": 1.0,
                "route/key_spans/value_nats": 0.25,
                "time/rollout_s": 2.0,
                "time/learner_s": 1.0,
                "time/step_s": 3.0,
                **metrics,
            }
        )
    lines.append({"step": steps, "heldout/pass_at_1": seed / 10, "heldout/samples": 8.0})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "config.yaml").write_text(
        f"run: {{name: {folder.name}, seed: {seed}, folder: {folder}}}\n"
        f"learner: {{optimizer: {{learning_rate: {learning_rate}}}}}\n"
    )
    return folder
