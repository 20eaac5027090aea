"""Two runs on paper for docs/cost.md: an 8 G model on one node, and a 70 G model on 64, whose step is derived line by
line.

Shapes are those of the models' public config.json. Must not know how a page reads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from trace_rl.config.run import RunConfig
from trace_rl.launch.placement import TEACHER as TEACHER_ROLE
from trace_rl.launch.placement import plan_placement, rank_role
from trace_rl.launch.plan import stages
from trace_rl.launch.plan.batch import plan_sync
from trace_rl.launch.plan.cluster import card_memory
from trace_rl.launch.plan.cost import StepCost, left_to_score, step_cost
from trace_rl.launch.plan.hardware import named
from trace_rl.launch.plan.memory import ENGINE, Forecast, kv_bytes_per_token
from trace_rl.launch.plan.run_plan import forecast_of
from trace_rl.launch.plan.shapes import ModelShape, model_shape
from trace_rl.launch.plan.stages import Given
from trace_rl.launch.plan.workload import Expected, busy_steps, workload
from trace_rl.overlays import load_config

CONFIGS = resources.files("trace_rl.configs")
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960,
    },
    "llama-70b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run that nobody starts."""

    config: RunConfig
    shape: ModelShape
    gpu: str
    expected: Expected

    def changed(self, settings: Mapping[str, Any]) -> Case:
        """With other values of some `section.key`."""
        config = self.config
        for dotted, value in settings.items():
            section, key = dotted.split(".")
            config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
        return Case(config, self.shape, self.gpu, self.expected)

    def expecting(self, **given: float) -> Case:
        """With other expectations."""
        return Case(self.config, self.shape, self.gpu, self.expected.model_copy(update=given))

    @property
    def gpu_bytes(self) -> int:
        return card_memory(self.gpu) or 0

    @cached_property
    def forecast(self) -> Forecast:
        sync, placement = plan_sync(self.config, self.shape), plan_placement(self.config)
        return forecast_of(self.config, self.shape, self.shape, sync, placement, self.gpu_bytes)

    @cached_property
    def given(self) -> Given:
        """What its cost is worked out from."""
        return Given(
            config=self.config,
            shape=self.shape,
            teacher=self.shape,
            sync=plan_sync(self.config, self.shape),
            cache_bytes=self.forecast.caches[ENGINE].pool,
            work=workload(self.config, self.expected),
            hardware=named(self.gpu),
        )

    @property
    def rank_bytes(self) -> int:
        """Of the GPU of a learner rank."""
        return self._bytes_of(rank_role(0))

    @property
    def teacher_bytes(self) -> int:
        return self._bytes_of(TEACHER_ROLE)

    def _bytes_of(self, role: str) -> int:
        memory = self.forecast.of(role)
        return memory.nbytes("device") if memory else 0


def step_of(case: Case, has_routes: bool = True) -> StepCost:
    """A step of the case."""
    return step_cost(case.given, busy_steps(case.config) if has_routes else ())


@contextmanager
def models() -> Iterator[Mapping[str, Path]]:
    """Folders with the config.json of each model, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: Path(folder) / name for name in MODELS}
        for name, path in found.items():
            path.mkdir()
            (path / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
        yield found


def one_node(folders: Mapping[str, Path]) -> Case:
    """The recipe of the 8 G model."""
    files = [Path(str(CONFIGS / "recipes/qwen3_8b_trace_fkl.yaml"))]
    config = load_config(files, [f"model.path={folders['qwen3-8b']}"])
    expected = Expected(prompt_tokens=200, response_tokens=2000, routed_rollouts_frac=0.5)
    return Case(config, _shape(config), "H100", expected)


def many_nodes(folders: Mapping[str, Path]) -> Case:
    """The 70 G model: 31 nodes of engines, 32 of the learner, one of the teacher."""
    wanted = {
        "model.path": folders["llama-70b"], "model.attention": "flash_attention_2", "data.path": "unread",
        "sampling.prompts_per_step": 512, "sampling.samples_per_prompt": 16, "sampling.max_response_tokens": 16384,
        "generator.num_engines": 31, "generator.tensor_parallel": 8, "learner.world_size": 256, "learner.zero_stage": 3,
        "learner.max_tokens_per_micro_batch": 17408, "teacher.max_tokens_per_batch": 17408,
        "placement.generator.num_gpus": 1, "placement.learner.num_gpus": 1, "placement.teacher.num_gpus": 1,
        "placement.ray_address": "auto",
    }  # fmt: skip
    files = [Path(str(CONFIGS / name)) for name in ("base.yaml", "methods/trace_fkl.yaml")]
    config = load_config(files, [f"{key}={value}" for key, value in wanted.items()])
    expected = Expected(prompt_tokens=300, response_tokens=3000, routed_rollouts_frac=0.5)
    return Case(config, _shape(config), "H200", expected)


def _shape(config: RunConfig) -> ModelShape:
    return model_shape(config.model, config.learner, torch.device("cpu"))


@dataclass(frozen=True)
class Derived:
    """A number with how it comes about; `arithmetic` has numbers, + - * / and parentheses only."""

    what: str
    arithmetic: str
    value: float
    unit: str


def derivation(case: Case) -> list[Derived]:
    """Every step from the shape of the model to the seconds of a synchronous step with routes."""
    given = case.given
    return [*_sizes(given), *_generation(given), *_teacher(given), *_learner(given), *_rest(case)]


def _sizes(given: Given) -> list[Derived]:
    shape, model, work = given.shape, given.shape.transformer, given.work
    workers = given.config.generator.tensor_parallel
    heads = shape.num_kv_heads // workers
    return [
        Derived(
            "weights of layers",
            f"{shape.num_layers} * ({shape.hidden} * (2 * {shape.query_width} + 2 * {shape.key_width} + 3 * "
            f"{shape.intermediate}) + 2 * {shape.hidden}) + {shape.hidden}",
            model.num_layer_parameters,
            "",
        ),
        Derived(
            "weights P", f"{model.num_layer_parameters} + 2 * {model.vocab} * {model.hidden}", shape.num_parameters, ""
        ),
        Derived("bytes of a sync W", f"2 * {shape.num_parameters}", shape.weights.nbytes, "B"),
        Derived(
            "cache of a token on a worker",
            f"{shape.num_layers} * {heads} * {shape.head_dim} * 2 * 2",
            kv_bytes_per_token(shape, workers),
            "B",
        ),
        Derived("rollouts a step", f"{work.prompts} * {work.samples}", work.num_rollouts, ""),
    ]


def _generation(given: Given) -> list[Derived]:
    config, work, model, hardware = given.config, given.work, given.shape.transformer, given.hardware
    done = stages.decoding(given, is_steady=False)
    prompts, workers = done.sequences // work.samples, config.generator.tensor_parallel
    mean, square, p = work.responses.mean, work.responses.mean_square, work.prompt_tokens
    kv, read = kv_bytes_per_token(given.shape, workers), 2 * (model.num_layer_parameters + model.vocab * model.hidden)
    memory_s = done.nbytes / hardware.roofs.copy_bytes_per_s
    prefill_s = done.prefill_flops / hardware.roofs.matmul_flops
    attention = 2 * model.num_layers * model.attention_width
    return [
        Derived("responses of the fullest engine", f"{prompts} * {work.samples}", done.sequences, ""),
        Derived(
            "its token steps",
            f"{work.responses.longest:.0f} + ({done.sequences} / {done.at_once:.0f} - 1) * {mean:.0f}",
            done.token_steps,
            "",
        ),
        Derived(
            "bytes that a worker reads for them",
            f"{done.token_steps:.4g} * {read:.4g} / {workers} + {done.sequences} * ({p:.0f} * {mean:.1f} + "
            f"{square:.4g} / 2) * {kv}",
            done.nbytes,
            "B",
        ),
        Derived(
            "seconds of that at the roof", f"{done.nbytes:.4g} / {hardware.roofs.copy_bytes_per_s:.4g}", memory_s, "s"
        ),
        Derived(
            "seconds of reading prompts",
            f"{prompts} * (2 * {model.num_layer_parameters} * {p:.0f} + {attention} * {p:.0f} * {p:.0f} + 2 * "
            f"{model.hidden} * {model.vocab}) / {workers} / {hardware.roofs.matmul_flops:.4g}",
            prefill_s,
            "s",
        ),
        Derived(
            "**generation**, expected",
            f"({memory_s:.4g} + {prefill_s:.4g}) / {hardware.shares.generation}",
            stages.generation(given).seconds,
            "s",
        ),
    ]


def _through_layers(given: Given) -> str:
    """E[F(p + r, 0)]."""
    work, model = given.work, given.shape.transformer
    mean, square, p = work.responses.mean, work.responses.mean_square, work.prompt_tokens
    attention = 2 * model.num_layers * model.attention_width
    return (
        f"(2 * {model.num_layer_parameters} * ({p:.0f} + {mean:.1f}) + {attention} * "
        f"({p:.0f} * {p:.0f} + 2 * {p:.0f} * {mean:.1f} + {square:.4g}))"
    )


def _teacher(given: Given) -> list[Derived]:
    config, work, hardware = given.config, given.work, given.hardware
    busy = busy_steps(config)
    flops = stages.teacher_flops(given, busy[0])
    mean = work.responses.mean
    rows = work.num_rollouts * mean * work.routed_tokens_frac
    refreshes = sum(config.teacher.weights.rate_at(step) > 0 for step in busy)
    link = rows * 2 * given.teacher.hidden + refreshes / len(busy) * given.shape.weights.nbytes
    return [
        Derived(
            "operations of the teacher, on half of the rollouts",
            f"{work.num_rollouts} * {work.routed_rollouts_frac} * {_through_layers(given)}",
            flops,
            "FLOP",
        ),
        Derived(
            "bytes of its states, and of new weights at every tenth step",
            f"{work.num_rollouts} * {mean:.1f} * {work.routed_tokens_frac} * 2 * {given.teacher.hidden} + {refreshes} "
            f"/ {len(busy)} * {given.shape.weights.nbytes}",
            link,
            "B",
        ),
        Derived(
            "**teacher**, expected",
            f"({flops:.4g} / {hardware.roofs.matmul_flops:.4g} + {link:.4g} / {hardware.roofs.link_bytes_per_s:.4g}) / "
            f"{hardware.shares.teacher}",
            stages.teacher(given, busy).seconds,
            "s",
        ),
    ]


def _learner(given: Given) -> list[Derived]:
    config, work, model, hardware = given.config, given.work, given.shape.transformer, given.hardware
    mean, ranks = work.responses.mean, config.learner.world_size
    flops, link = stages.learner_flops(given, True), stages.learner_link_bytes(given)
    passes = stages.learner_passes(given)
    return [
        Derived(
            "operations of the learner: four passes through the layers, 3 and a routed share through the head",
            f"{work.num_rollouts} * (4 * {_through_layers(given)} + (3 + {work.routed_tokens_frac}) * 2 * "
            f"{model.hidden} * {model.vocab} * {mean:.1f})",
            flops,
            "FLOP",
        ),
        Derived(
            "micro-batches of a rank, rounded up",
            f"{work.num_rollouts} * ({work.prompt_tokens:.0f} + {mean:.1f}) / {ranks} / "
            f"{config.learner.max_tokens_per_micro_batch}",
            passes,
            "",
        ),
        Derived(
            "bytes that a rank gathers and gives for them",
            f"{passes} * (2 * 2 + 4) * {given.shape.num_parameters} * {ranks - 1} / {ranks}",
            link,
            "B",
        ),
        Derived(
            "seconds of that, hidden behind products",
            f"{link:.4g} / {hardware.roofs.ring_bytes_per_s:.4g}",
            link / hardware.roofs.ring_bytes_per_s,
            "s",
        ),
        Derived(
            "**learner**, expected",
            f"{flops:.4g} / {ranks} / {hardware.roofs.matmul_flops:.4g} / {hardware.shares.learner}",
            stages.learner(given, True).seconds,
            "s",
        ),
    ]


def _rest(case: Case) -> list[Derived]:
    given, step = case.given, step_of(case)
    ranks, nbytes, hardware = given.config.learner.world_size, given.sync.nbytes, given.hardware
    generation_s = stages.generation(given).seconds
    scoring_s = step.of(stages.TEACHER).seconds - stages.refresh_s(given, busy_steps(given.config))
    moments = left_to_score(given.work, given.config.prompts_scored_together)
    come, left = max(moments, key=lambda moment: generation_s * moment[0] + scoring_s * moment[1])
    done_s = generation_s * come + scoring_s * left
    parts = [done_s, *(step.of(name).seconds for name in (stages.LEARNER, stages.SYNC, stages.DRIVER))]
    return [
        Derived(
            "**sync**, expected",
            f"({nbytes:.4g} * {ranks - 1} / {ranks} / {hardware.roofs.ring_bytes_per_s:.4g} + {nbytes:.4g} / "
            f"{hardware.roofs.link_bytes_per_s:.4g}) / {hardware.shares.sync}",
            stages.sync(given).seconds,
            "s",
        ),
        Derived(
            "**driver**",
            f"{given.work.num_rollouts} * {hardware.fixed.driver_s}",
            stages.driver(given).seconds,
            "s",
        ),
        Derived(
            "the teacher is done: what is left to score when so much is written",
            f"{generation_s:.4g} * {come:.4g} + {scoring_s:.4g} * {left:.4g}",
            done_s,
            "s",
        ),
        Derived(
            "**a step**: that, learner, sync, driver",
            " + ".join(f"{part:.4g}" for part in parts),
            step.seconds,
            "s",
        ),
    ]
