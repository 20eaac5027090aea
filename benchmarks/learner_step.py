"""What a step of the learner costs: seconds, throughput, padding and memory, by layout and share of routed tokens.

    python benchmarks/learner_step.py [--preset demo] [--out benchmarks/results]

One DeepSpeed engine in this process takes optimizer steps on random sequences in groups, as a run would hand them over.
First the gradient of a small batch is compared with float64, and the script stops if it is off. Then all cases take
turns, so that noise hits all alike. A ratio is the median over turns of a case's seconds divided by those of padded
sequences without routes in the same turn. The share of the roof is that of a large matrix product measured on the spot;
work is counted without padding, recomputation and prompts that are shared (`trace_rl.flops`), three forward passes a
step.
"""

from __future__ import annotations

import datetime
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import typer
from report import describe_machine, one_line, publish
from roofs import matmul_flops
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from widened import widen

from trace_rl.batch import RolloutKey, TrainingBatch, TrainingSequence
from trace_rl.config.run import RunConfig
from trace_rl.objective import objective_of
from trace_rl.states import states_array, states_tensor
from trace_rl.step_metrics import learner_work
from trace_rl.tasks.arithmetic import base_model_path
from trace_rl.token_layout import Layout, Packed, Padded, SharedPrompts
from trace_rl.workers import environment, shared_attention
from trace_rl.workers.batch_runner import BatchRunner, StepReport
from trace_rl.workers.policy_model import RowModel, head_weight, is_flash, load_policy, transformer_shape
from trace_rl.workers.ranks import Ranks

PACKAGES = ("torch", "deepspeed", "transformers", "flash-attn")
SHARES = (0.0, 0.05, 0.1, 0.25, 1.0)
BASE = ("padded", 0.0)
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative error of the gradient norm; most of it is that of the model's layers, not of the loss."""
CHECKED_SEQUENCES = 8


@dataclass(frozen=True)
class Preset:
    """A model, and the sequences of a step."""

    config: dict[str, int] | None
    """Of a random Qwen3 model; None: the base model of the arithmetic task."""
    num_prompts: int
    prompt_tokens: int
    response_tokens: int
    """On average; lengths vary by half of it in both directions."""
    max_tokens: int
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = True
    neurons: int = 0
    """Of each MLP of the base model, which is widened to them; 0: as many as it has."""


def _qwen3(hidden: int, intermediate: int) -> dict[str, int]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }


PRESETS = {
    "demo": Preset(None, 8, 39, 62, 2048, "float32", gradient_checkpointing=False),
    "wide": Preset(None, 8, 39, 62, 2048, "float32", gradient_checkpointing=False, neurons=2816),
    "gpu-0.6b": Preset(_qwen3(1024, 3072), 8, 256, 1500, 16384),
    "gpu-1.7b": Preset(_qwen3(2048, 6144), 8, 256, 1500, 16384),
}
"""`demo`: lengths of the demo's own prompts and responses; `wide`: with the larger model of the race. The others are
the shapes of Qwen3 0.6B and 1.7B."""


def make_model(preset: Preset, folder: Path) -> Path:
    """Folder of the preset's model; a random one is written to `folder`."""
    if preset.config is None and preset.neurons:
        widen(base_model_path(), preset.neurons, folder)
        return folder
    if preset.config is None:
        return base_model_path()
    torch.manual_seed(0)
    config = Qwen3Config(**preset.config, tie_word_embeddings=True, max_position_embeddings=40960)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, preset.dtype)).save_pretrained(folder)
    return folder


def run_config(preset: Preset, path: Path) -> RunConfig:
    """GRPO with forward KL, unclipped so that the check is short; the batch decides which tokens take it."""
    route = {"selector": {"tokens": "all"}, "action": {"type": "fkl", "clip": {"mode": "none"}}}
    return RunConfig.model_validate(
        {
            "model": {"path": str(path), "dtype": preset.dtype},
            "data": {"path": "unused"},
            "sampling": {
                "max_prompt_tokens": preset.prompt_tokens,
                "max_response_tokens": 2 * preset.response_tokens,
            },
            "algorithm": {"routes": {"key": route}},
            "learner": {
                "max_tokens_per_micro_batch": preset.max_tokens,
                "gradient_checkpointing": preset.gradient_checkpointing,
                "optimizer": {"learning_rate": 1e-9},  # steps cost the same, and leave the weights where they were
            },
        }
    )


def make_batch(preset: Preset, share: float, hidden: int, vocab: int, seed: int) -> TrainingBatch:
    """Groups of 8 random completions; `share` of the response tokens of every completion is routed."""
    random = np.random.default_rng(seed)
    count = 8 * preset.num_prompts
    sequences = []
    for number in range(count):
        if number % 8 == 0:
            prompt = tuple(random.integers(0, vocab, preset.prompt_tokens).tolist())
        time_ = int(random.integers(preset.response_tokens // 2, 3 * preset.response_tokens // 2 + 1))
        rows = round(share * time_)
        states = torch.from_numpy(random.standard_normal((rows, hidden), dtype=np.float32))
        sequences.append(
            TrainingSequence(
                key=RolloutKey(f"p{number // 8}", number % 8),
                prompt_token_ids=prompt,
                token_ids=tuple(random.integers(0, vocab, time_).tolist()),
                rollout_logprobs=np.full(time_, -np.log(vocab), dtype=np.float32),
                staleness=np.zeros(time_, dtype=np.int64),
                advantages=np.full(time_, random.normal(), dtype=np.float32),
                pg_weight=np.full(time_, 1 / (count * time_), dtype=np.float32),
                route_positions=np.sort(random.choice(time_, rows, replace=False)),
                route_index=np.zeros(rows, dtype=np.int64),
                route_weight=np.full(rows, 0.5 / (count * time_), dtype=np.float32),
                teacher_row=np.arange(rows),
                teacher_hidden=states_array(states.to(getattr(torch, preset.dtype))),
            )
        )
    return TrainingBatch(0, tuple(sequences))


class Runner(Protocol):
    """Takes optimizer steps on batches in one layout, as `trace_rl.workers.batch_runner.BatchRunner`."""

    def set_teacher_head(self, head: Tensor) -> None: ...

    def train_step(self, batch: TrainingBatch) -> StepReport: ...


Engine = Callable[[PreTrainedModel, RunConfig, torch.device], Callable[[Layout], Runner]]
"""Builds what takes the steps around a model, and returns the runner of a layout."""


def deepspeed_runners(policy: PreTrainedModel, config: RunConfig, device: torch.device) -> Callable[[Layout], Runner]:
    """The engine of a run; all that are built in a process share its process group."""
    from trace_rl.workers import deepspeed_engine

    if not torch.distributed.is_initialized():
        store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
        deepspeed_engine.join_process_group(store, 0, 1, timeout_s=600)
    is_bfloat16 = config.model.dtype == "bfloat16"
    engine = deepspeed_engine.build_engine(RowModel(policy), config.learner, is_bfloat16, 1000)
    engine.train()
    objective = objective_of(config.algorithm, 1.0)
    return lambda layout: BatchRunner(engine, config.learner, objective, Ranks(0, 1), layout, device)


class OfAttention:
    """A runner under whose steps the model has an attention of its own; others share the model."""

    def __init__(self, runner: Runner, policy: PreTrainedModel, attention: str) -> None:
        self._runner = runner
        self._policy = policy
        self._attention = attention

    def set_teacher_head(self, head: Tensor) -> None:
        self._runner.set_teacher_head(head)

    def train_step(self, batch: TrainingBatch) -> StepReport:
        before = self._policy.config._attn_implementation
        self._policy.config._attn_implementation = self._attention
        try:
            return self._runner.train_step(batch)
        finally:
            self._policy.config._attn_implementation = before


class Learner:
    """One model, and a runner of batches for each layout over it.

    Args:
        adapt: what is done to the loaded model before anything else.
    """

    def __init__(
        self,
        preset: Preset,
        path: Path,
        engine: Engine = deepspeed_runners,
        adapt: Callable[[PreTrainedModel], None] = lambda policy: None,
    ) -> None:
        self.config = config = run_config(preset, path)
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        policy = load_policy(config.model, self.device)
        adapt(policy)
        if preset.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.attention = str(policy.config._attn_implementation)
        self.shape = transformer_shape(policy, len(head_weight(policy)))
        self.head = torch.randn(self.shape.vocab, self.shape.hidden, generator=torch.Generator().manual_seed(1))
        # without flash attention a packed row costs the square of its length
        layouts: dict[str, Layout] = {"padded": Padded()} | ({"packed": Packed()} if is_flash(policy) else {})
        runner_of = engine(policy, config, self.device)
        self.runners = {name: runner_of(layout) for name, layout in layouts.items()}
        self.runners["shared"] = OfAttention(runner_of(SharedPrompts()), policy, shared_attention.NAME)
        for runner in self.runners.values():
            runner.set_teacher_head(self.head.to(self.device, getattr(torch, preset.dtype)))

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def check(learner: Learner, preset: Preset, path: Path, seed: int) -> dict[str, float]:
    """Relative error of each layout's gradient norm against plain torch in float64, on a few sequences.

    Raises:
        SystemExit: one is off by more than its bound.
    """
    batch = make_batch(preset, 0.25, learner.shape.hidden, learner.shape.vocab, seed)
    few = TrainingBatch(0, batch.sequences[:CHECKED_SEQUENCES])
    exact = exact_norm(path, learner, preset, few)
    errors = {}
    for name, runner in learner.runners.items():
        errors[name] = abs(runner.train_step(few).grad_norms[0] - exact) / exact
        if not errors[name] <= BOUND[preset.dtype]:
            raise SystemExit(f"the gradient norm of {name} sequences is off by {errors[name]:.2e} of itself")
    return errors


def exact_norm(path: Path, learner: Learner, preset: Preset, batch: TrainingBatch) -> float:
    """Norm of the exact gradient."""
    dtype = getattr(torch, preset.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(learner.device).double()
    head = learner.head.to(dtype).double().to(learner.device)
    return float(torch.nn.utils.get_total_norm(exact_gradients(model, head, batch)))


def exact_gradients(model: PreTrainedModel, head: Tensor, batch: TrainingBatch) -> list[Tensor]:
    """All gradients of -sum w A log p + sum v KL(q || p), one sequence at a time, without any of our losses.

    Args:
        model: in float64, as is the teacher's `head`.
    """
    for item in batch.sequences:
        ids = torch.tensor([item.prompt_token_ids + item.token_ids], device=model.device)
        logprobs = model(input_ids=ids).logits[0, len(item.prompt_token_ids) - 1 : -1].log_softmax(-1)
        own = logprobs[range(len(item.token_ids)), list(item.token_ids)]
        weights = torch.from_numpy(item.pg_weight * item.advantages).double().to(model.device)
        states = states_tensor(item.teacher_hidden).double().to(model.device)
        taught = (states @ head.T).log_softmax(-1)
        kl = F.kl_div(logprobs[item.route_positions], taught, reduction="none", log_target=True).sum(-1)
        routed = torch.from_numpy(item.route_weight).double().to(model.device)
        (-(weights * own).sum() + (routed * kl).sum()).backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def measure(
    learner: Learner, preset: Preset, repeats: int, seed: int, shares: Sequence[float] = SHARES
) -> list[dict[str, Any]]:
    """Seconds, throughput and padding of every layout at every share of routed tokens, the first of which is 0."""
    shape = learner.shape
    batches = {share: make_batch(preset, share, shape.hidden, shape.vocab, seed) for share in shares}
    cases = [(layout, share) for layout in learner.runners for share in shares]
    seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    padding = {}
    for turn in range(repeats + 1):
        first = turn % len(cases)  # whoever comes first finds caches that another has left
        for layout, share in cases[first:] + cases[:first]:
            learner.synchronise()
            start = time.perf_counter()
            report = learner.runners[layout].train_step(batches[share])
            learner.synchronise()
            padding[layout, share] = report.padding_frac
            if turn:  # the first one warms caches
                seconds[layout, share].append(time.perf_counter() - start)
    roof = matmul_flops(learner.device, getattr(torch, preset.dtype))
    results = []
    for layout, share in cases:
        own = seconds[layout, share]
        laid = learner.config.learner.model_copy(update={"layout": layout})
        done = learner_work(batches[share], shape, learner.config.model_copy(update={"learner": laid}))
        work = 3e12 * done["learner/forward_tflop"]
        median = statistics.median(own)
        results.append(
            {
                "layout": layout,
                "share": share,
                "seconds": median,
                "ratio": statistics.median(mine / base for mine, base in zip(own, seconds[BASE], strict=True)),
                "tokens_per_s": done["learner/tokens"] / median,
                "flops_per_s": work / median,
                "roof_frac": work / median / roof,
                "padding_frac": padding[layout, share],
            }
        )
    return results


def run_preset(preset: Preset, repeats: int, seed: int) -> dict[str, Any]:
    """Everything that the report says of one size."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(preset, Path(folder))
        learner = Learner(preset, path)
        errors = check(learner, preset, path, seed)
        results = measure(learner, preset, repeats, seed)
    is_cuda = learner.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **asdict(preset),
        "attention": learner.attention,
        "errors": errors,
        "results": results,
        "peak_memory_mib": peak / 2**20,
    }


def to_markdown(report: dict[str, Any]) -> str:
    found = report["result"]
    lines = ["# A step of the learner", "", f"`{report['command']}`, {report['date']}, seed {report['seed']}", ""]
    lines += [f"On {one_line(report['machine'])}.", ""]
    lines += [
        f"Preset {report['preset']}, {found['dtype']}, attention {found['attention']}: {8 * found['num_prompts']} "
        f"sequences of {found['prompt_tokens']} + about {found['response_tokens']} tokens; peak memory "
        f"{found['peak_memory_mib']:.0f} MiB. Relative error of the gradient norm against float64: "
        + ", ".join(f"{name} {error:.1e}" for name, error in found["errors"].items())
        + ".",
        "",
        "| layout | routed | seconds | ratio | tokens/s | share of the matmul roof | padding |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['layout']} | {row['share']:.0%} | {row['seconds']:.3g} | {row['ratio']:.2f} | "
        f"{row['tokens_per_s']:.0f} | {row['roof_frac']:.0%} | {row['padding_frac']:.1%} |"
        for row in found["results"]
    ]
    if report["left_out"]:
        lines += ["", *(f"- not yet measured: {name} ({why})" for name, why in report["left_out"].items())]
    return "\n".join(lines) + "\n"


def main(
    preset: Annotated[str, typer.Option(help=f"Of {', '.join(PRESETS)}.")] = "demo",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that are timed.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the sequences.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON and the Markdown.")] = None,
) -> None:
    """Check, measure, print, and write where --out says."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"no preset {preset}; there are {', '.join(PRESETS)}")
    has_gpu = torch.cuda.is_available()
    if preset.startswith("gpu") and not has_gpu:
        raise typer.BadParameter(f"preset {preset} needs a GPU, and torch sees none")
    left_out = {} if has_gpu else {name: "no GPU" for name in PRESETS if name.startswith("gpu")}
    report = {
        "command": f"python benchmarks/learner_step.py --preset {preset} --repeats {repeats} --seed {seed}",
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "preset": preset,
        "machine": describe_machine(PACKAGES) | {"threads": torch.get_num_threads()},
        "result": run_preset(PRESETS[preset], repeats, seed),
        "left_out": left_out,
    }
    publish(f"learner_step_{preset}", report, to_markdown(report), out)


if __name__ == "__main__":
    environment.apply()
    if not environment.has_gpu():
        torch.set_num_threads(1)  # as in a run
    typer.run(main)
