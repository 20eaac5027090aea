"""The plan of a run: its arithmetic by hand, its memory against what is measured, and what does not fit."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from learner_harness import Group, Host, batch, run_config
from typer.testing import CliRunner

from trace_rl.config.learner import LearnerSettings
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.data import RowSource, to_prompts
from trace_rl.errors import TraceError
from trace_rl.launch.cli import app
from trace_rl.launch.model_files import EMBEDDED, resolve_model
from trace_rl.launch.placement import Node
from trace_rl.launch.plan.batch import prompts_in_flight
from trace_rl.launch.plan.cluster import gpu_memory
from trace_rl.launch.plan.memory import (
    REDUCE_BUCKET_VALUES,
    RoleMemory,
    activation_bytes,
    checkpoint_bytes,
    kv_bytes_per_token,
)
from trace_rl.launch.plan.run_plan import RunPlan, plan_checked, plan_run, problems
from trace_rl.launch.plan.shapes import model_shape
from trace_rl.launch.plan.text import full_text, short_text, size
from trace_rl.overlays import load_config
from trace_rl.workers.generator_engine import GeneratorEngine
from trace_rl.workers.learner import learner_spec
from trace_rl.workers.weight_wire import WeightManifest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")
GIB = 2**30
DEMO_PARAMETERS = 514_048
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_8B_PARAMETERS = 8_190_735_360
"""2 x 151,936 x 4,096 + 36 x (4,096 x (2 x 4,096 + 2 x 1,024 + 3 x 12,288) + 2 x 4,096 + 2 x 128) + 4,096"""
API = {"type": "api", "base_url": "http://127.0.0.1:1/v1", "name": "m", "max_prompt_tokens": 1000}


@pytest.fixture(scope="module")
def demo() -> RunPlan:
    return plan_checked(load_config([CONFIGS / "demo.yaml"], []), None)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of Qwen3-8B and nothing else."""
    folder = tmp_path_factory.mktemp("qwen3-8b")
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


def large_plan(folder: Path, *overrides: str, gpu_gib: float = 0, rows: int = 64, **checked: Any) -> RunPlan:
    """A plan of base.yaml with 8 learner ranks under ZeRO-3, all on GPUs, in bfloat16."""
    wanted = [
        f"model.path={folder}", "data.path=rows.jsonl", "learner.world_size=8", "learner.zero_stage=3",
        "placement.generator.num_gpus=1", "placement.learner.num_gpus=1", "placement.teacher.num_gpus=1",
        "model.attention=flash_attention_2", "placement.ray_address=auto",
    ]  # fmt: skip
    config = load_config([CONFIGS / "base.yaml"], [*wanted, *overrides])
    prompts = to_prompts([(str(row), {"question": f"{row}?", "answer": "1"}) for row in range(rows)])
    return plan_run(config, RowSource(prompts, [], seed=0), int(gpu_gib * GIB) or None, **checked)


def items_of(memory: RoleMemory | None) -> dict[str, int]:
    assert memory is not None
    return {item.what: item.nbytes for item in memory.items}


def test_batches_of_the_demo(demo: RunPlan) -> None:
    batch = demo.batch
    # 8 x 8 sequences of at most 512 + 128 tokens; 2,048 tokens hold 3 of them, so that 22 micro-batches go to 2 ranks
    assert (batch.num_sequences, batch.max_tokens) == (64, 64 * 640)
    assert (batch.micro_batches, batch.sequences_per_micro_batch, batch.idle_micro_batches) == (11, 3, 0)
    assert (batch.optimizer_steps, batch.sequences_per_optimizer_step, batch.steps) == (1, 64, 100)
    assert batch.epochs is None


def test_minibatches_and_shared_sequences_are_planned_as_the_learner_runs_them(large: Path) -> None:
    batch = large_plan(large, "learner.minibatches_per_step=4", "learner.sequence_parallel=2", rows=96).batch
    # 8 prompts x 8 samples an optimizer step; 16,384 tokens hold 3 of 5,120; 22 micro-batches for 4 groups of ranks,
    # each then one of 6, so that the last two have to be made of halves
    assert (batch.optimizer_steps, batch.sequences_per_optimizer_step, batch.num_shares) == (4, 64, 4)
    assert (batch.micro_batches, batch.sequences_per_micro_batch) == (6, 3)
    assert batch.epochs == 300 * 32 / 96


def test_groups_that_share_a_prompt_are_planned_together(large: Path) -> None:
    batch = large_plan(
        large, "learner.layout=shared", "model.attention=sdpa", "learner.max_tokens_per_micro_batch=40000"
    ).batch
    # of 1,024 + 4,096 tokens: 8 responses behind one prompt are 1,023 + 8 x 4,097 = 33,799; 32 such for 8 ranks
    assert (batch.sequences_per_optimizer_step, batch.micro_batches, batch.sequences_per_micro_batch) == (256, 4, 8)


def test_ranks_without_work_are_counted_and_told(large: Path) -> None:
    plan = large_plan(large, "sampling.prompts_per_step=2", "sampling.samples_per_prompt=3")
    # 6 sequences for 8 ranks
    assert (plan.batch.micro_batches, plan.batch.idle_micro_batches) == (1, 2)
    assert any("2 of their passes run over nothing" in warning for warning in plan.warnings)


def test_sizes_of_a_model_of_eight_billion_parameters(large: Path) -> None:
    shape = model_shape(Model(path=str(large)), LearnerSettings(), CPU)
    assert shape.num_parameters == shape.num_trained == QWEN3_8B_PARAMETERS
    assert shape.weights.nbytes == 2 * QWEN3_8B_PARAMETERS  # 16.4 GB
    # 36 layers x 8 heads x 128 x keys and values x 2 bytes; of two workers each has 4 heads, of 16 each has one
    assert kv_bytes_per_token(shape, 1) == 144 * 1024
    assert kv_bytes_per_token(shape, 2) == 72 * 1024
    assert kv_bytes_per_token(shape, 16) == 18 * 1024


def test_memory_of_a_learner_rank_by_hand(large: Path) -> None:
    found = items_of(large_plan(large).forecast.of("learner rank 7"))
    part = QWEN3_8B_PARAMETERS // 8
    head = 151_936 * 4096
    assert found["weights"] == 2 * part
    assert found["float32 weights"] == 4 * part
    assert found["Adam's moments"] == 8 * part
    assert found["gradients"] == 4 * part
    assert found["DeepSpeed's reduction buffer"] == 4 * 500_000_000
    assert found["weights gathered for use"] == 2 * 1_000_000_000
    assert found["two tiles of logits"] == GIB
    assert found["gradient of the output head"] == 4 * head
    # 16,384 tokens: 36 inputs of layers of 8,192 bytes, and twice one layer of
    # 16 x 4,096 + 10 x (4,096 + 1,024) + 8 x 12,288 = 215,040 bytes
    assert found["activations"] == 16384 * (36 * 8192 + 2 * 215_040)
    # two buckets, the largest of which holds the embedding alone
    assert found["buckets of a sync"] == 2 * 2 * head
    assert not {"the teacher's head", "gradients of a measured step"} & found.keys()


def test_stages_offload_and_adapters_move_memory_where_they_should(large: Path) -> None:
    whole, part = QWEN3_8B_PARAMETERS, QWEN3_8B_PARAMETERS // 8
    second = items_of(large_plan(large, "learner.zero_stage=2").forecast.of("learner rank 0"))
    assert (second["weights"], second["float32 weights"], second["gradients"]) == (2 * whole, 4 * part, 4 * part)
    assert second["DeepSpeed's reduction buffer"] == 2 * 500_000_000
    first = items_of(large_plan(large, "learner.zero_stage=1").forecast.of("learner rank 0"))
    assert (first["weights"], first["Adam's moments"], first["gradients"]) == (2 * whole, 8 * part, 4 * whole)
    offloaded = large_plan(large, "learner.offload=optimizer").forecast.of("learner rank 0")
    assert offloaded is not None
    assert offloaded.nbytes("host") == (4 + 8 + 4) * part
    lora = items_of(large_plan(large, "learner.lora.rank=16").forecast.of("learner rank 0"))
    # rank x (in + out) of q, k, v, o, gate, up and down in 36 layers
    trained = 16 * 36 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    assert lora["Adam's moments"] == trained  # 8 bytes, an eighth of them
    assert lora["weights"] == 2 * part + 2 * trained


def test_size_of_a_checkpoint_by_hand(large: Path) -> None:
    parameters, plain = QWEN3_8B_PARAMETERS, large_plan(large)
    assert checkpoint_bytes(plain.config, plain.shape) == (2 + 12) * parameters
    adapted = large_plan(large, "learner.lora.rank=8")
    assert checkpoint_bytes(adapted.config, adapted.shape) == 4 * parameters + (2 + 12) * adapted.shape.num_trained
    route = "algorithm.routes={r: {selector: {tokens: all}, action: fkl}}"
    for kind, copy in (("ema", 4), ("periodic", 2), ("live", 0)):
        settings = [f"model.path={large}", "data.path=rows.jsonl", route, f"teacher.weights={{type: {kind}}}"]
        config = load_config([CONFIGS / "base.yaml"], settings)
        assert checkpoint_bytes(config, plain.shape) == (2 + 12 + copy) * parameters


def test_checkpointing_is_what_makes_long_sequences_fit(large: Path) -> None:
    kept = items_of(large_plan(large, "learner.gradient_checkpointing=false").forecast.of("learner rank 0"))
    assert kept["activations"] == 16384 * 37 * 215_040
    shared = items_of(large_plan(large, "learner.sequence_parallel=2").forecast.of("learner rank 0"))
    assert shared["activations"] == 8192 * (36 * 8192 + 2 * 215_040)


class Counting(Host):
    """A host of a learner rank that tells what the rank holds."""

    def manifest(self) -> WeightManifest:
        return self._rank._manifest

    def held(self) -> dict[str, int]:
        engine = self._rank._engine
        parameters = [getattr(each, "ds_tensor", each) for each in engine.module.parameters()]
        parameters += getattr(engine.optimizer, "fp16_partitioned_groups_flat", [])
        known = {each.untyped_storage().data_ptr() for each in parameters}
        own = [each for group in engine.optimizer.param_groups for each in group["params"]]
        trained = getattr(engine.optimizer, "fp32_partitioned_groups_flat", own)
        copies = [each for each in trained if each.untyped_storage().data_ptr() not in known]
        moments = [
            value
            for state in engine.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.numel() > 1
        ]
        buffers = [getattr(each, "buffer", None) for each in getattr(engine.optimizer, "ipg_buckets", {}).values()]

        def total(tensors: list[Any]) -> int:
            storages = [each.untyped_storage() for each in tensors if torch.is_tensor(each)]
            return sum({each.data_ptr(): each.nbytes() for each in storages}.values())

        return {
            "weights": total(parameters),
            "float32 weights": total(copies),
            "Adam's moments": total(moments),
            "DeepSpeed's reduction buffer": total(buffers),
        }


@pytest.fixture(scope="module")
def counting(local_ray: None) -> Iterator[Group]:
    group = Group(0)
    group.actors = [ray.remote(Counting).options(num_cpus=0.25).remote(rank) for rank in range(2)]
    yield group
    group.close()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")],
)
def test_the_learner_holds_what_is_forecast(counting: Group, stage: int, dtype: str) -> None:
    model = resolve_model(Model(path=EMBEDDED)).path
    config = run_config(model, routes=False, dtype=dtype, zero_stage=stage, world_size=2)
    counting.build(learner_spec(config), head=None)
    counting.train([batch(0, is_routed=False)])
    forecast = items_of(plan_run(config, None, None).forecast.of("learner rank 0"))
    for held in counting.all("held"):
        # shards are filled up to a multiple of some values
        for what in ("weights", "float32 weights", "Adam's moments"):
            assert held[what] == pytest.approx(forecast[what], abs=1024), what
    # under ZeRO-3 the buffer stays; on CPUs, what is not written to takes no memory
    assert held["DeepSpeed's reduction buffer"] == (4 * REDUCE_BUCKET_VALUES if stage == 3 else 0)


def test_a_sync_sends_what_is_planned(counting: Group) -> None:
    config = run_config(resolve_model(Model(path=EMBEDDED)).path, zero_stage=3, world_size=2)
    counting.build(learner_spec(config), head=None)
    manifest = counting.all("manifest")[0]
    plan = plan_run(config, None, None)
    assert manifest == plan.shape.weights
    assert plan.sync.nbytes == 4 * DEMO_PARAMETERS
    assert (plan.sync.num_weights, plan.sync.num_buckets, plan.sync.num_members) == (46, 1, 2)


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(model_path: str, dtype: str, layout: str) -> None:
    from trace_rl.token_layout import Padded, SharedPrompts
    from trace_rl.workers import shared_attention
    from trace_rl.workers.policy_model import final_hidden, load_policy

    prompt, response = tuple(range(64)), tuple(range(64))
    policy = load_policy(Model(path=model_path, dtype=dtype), CPU)
    if layout == "shared":
        shared_attention.prepare(policy)
        grid = SharedPrompts().grid([prompt + response] * 4, [64] * 4)
    else:
        grid = Padded().grid([prompt + response, (prompt + response)[:100]])  # padding, so that there is a mask
    config = run_config(model_path, dtype=dtype, layout=layout, max_tokens_per_micro_batch=grid.input_ids.numel())
    update = {"max_prompt_tokens": 64, "max_response_tokens": 64, "samples_per_prompt": 4}
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=update)})
    own = {each.untyped_storage().data_ptr() for each in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = final_hidden(policy, grid)
    assert states.requires_grad
    forecast = activation_bytes(config, model_shape(config.model, config.learner, CPU))
    # the forecast has the gradients of one of the 2 layers on top; embedding and last norm are not counted
    assert sum(kept.values()) == pytest.approx(forecast * 2 / 3, rel=0.05)


def test_an_engine_has_the_cache_that_is_forecast(local_ray: None, model_path: str) -> None:
    model = Model(path=model_path, dtype="float32")
    engine = ray.remote(GeneratorEngine).options(num_cpus=1).remote(
        0, model, GeneratorSettings(kv_cache_gib=1), max_model_len=256, backend="gloo", loaded_version=0
    )  # fmt: skip
    try:
        ray.get(engine.ready.remote(), timeout=180)
        blocks, tokens = ray.get(engine.__ray_call__.remote(_cache_of), timeout=60)
    finally:
        ray.kill(engine)
    config = run_config(model_path)
    cache = plan_run(config, None, None).forecast.caches["generator engine"]
    # 2 layers x 1 head x 32 x 2 x 4 bytes
    assert cache.bytes_per_token == 512
    assert cache.sequences == GIB / 512 / 32
    # the last block that does not fit whole is left out, and one is the engine's own
    assert blocks * tokens * cache.bytes_per_token == pytest.approx(GIB, rel=1e-3)


def _cache_of(engine: Any) -> tuple[int, int]:
    """Runs in the engine's process: blocks of its cache, and tokens of a block."""
    settings = engine._llm.llm_engine.vllm_config.cache_config
    return settings.num_gpu_blocks, settings.block_size


def test_what_an_engine_holds_follows_its_share_of_a_gpu(large: Path) -> None:
    plan = large_plan(large, "generator.tensor_parallel=2", "generator.num_engines=2", gpu_gib=80)
    found, cache = items_of(plan.forecast.of("generator engine 1")), plan.forecast.caches["generator engine"]
    pool = int(0.85 * 80 * GIB) - QWEN3_8B_PARAMETERS - 2 * GIB
    assert (found["weights"], found["key-value cache"]) == (QWEN3_8B_PARAMETERS, pool)
    assert cache.sequences == pool / (72 * 1024 * 5120)
    # 256 sequences for two engines
    assert not any("vLLM sets some back" in warning for warning in plan.warnings)
    alone = large_plan(large, gpu_gib=80)
    assert any("holds 72.2 sequences of full length, and up to 256 run at once" in item for item in alone.warnings)
    assert large_plan(large).forecast.caches["generator engine"].sequences is None


def test_the_teacher_costs_a_model_for_each_share_and_an_average_on_the_cpu(large: Path) -> None:
    route = "algorithm.routes={r: {selector: {tokens: all}, action: fkl}}"
    mixed = large_plan(large, route, "teacher.weights={type: trust_region}").forecast
    assert items_of(mixed.of("the teacher"))["weights of 2 models"] == 4 * QWEN3_8B_PARAMETERS
    assert items_of(mixed.of("learner rank 0"))["the teacher's head"] == 2 * 2 * 151_936 * 4096
    assert "attention of a layer over shared prompts" not in items_of(mixed.of("the teacher"))
    # without flash attention 16,384 tokens of 2 bytes: 4,096 queries each, and for groups of 8 x 5,120 tokens that are
    # 1,023 + 8 x 4,097 keys and values of that width, and a mask of 4,097 rows
    plain = large_plan(large, route, "model.attention=sdpa").forecast.of("the teacher")
    seen = 5120 / (1023 + 8 * 4097)
    expected = 16_384 * 2 * (4096 + (2 * 4096 * 8 + 4097) * seen)
    assert items_of(plain)["attention of a layer over shared prompts"] == pytest.approx(expected, abs=1)
    average = large_plan(large, route, "teacher.weights={type: ema}").forecast.of("the teacher")
    assert items_of(average)["float32 average"] == 4 * QWEN3_8B_PARAMETERS
    # 256 completions of 4,096 tokens, 4,096 values of 2 bytes each
    assert items_of(average)["states of a step, all tokens routed"] == 256 * 4096 * 4096 * 2
    assert large_plan(large).forecast.of("the teacher") is None


@pytest.mark.parametrize(
    ("scheduling", "expected"),
    [("{}", 32), ("{max_staleness: 2}", 96), ("{max_staleness: 1, late: drop, oversampling_frac: 0.3}", 74)],
)
def test_prompts_in_flight(large: Path, scheduling: str, expected: int) -> None:
    plan = large_plan(large, f"scheduling={scheduling}")
    assert prompts_in_flight(plan.config) == expected  # 32 x (1 + staleness) + ceil(0.3 x 32)
    assert f"at most {expected} prompts sampled or waiting" in re.sub(r"\s+", " ", full_text(plan))


def test_the_bill_of_an_annotator_is_one_request_a_rollout_at_the_steps_that_ask(large: Path) -> None:
    spans = "{selector: {rollouts: correct, tokens: key_spans}, action: fkl, schedule: {type: linear, steps: 3}}"
    prices = {"price_per_million_prompt_tokens": 2.0, "price_per_million_completion_tokens": 10.0}
    backend = {**API, "max_reply_tokens": 100, "budget": prices, "limits": {"requests_per_minute": 64}}
    plan = large_plan(large, f"algorithm.routes={{r: {spans}}}", f"annotator.backend={json.dumps(backend)}")
    cost = plan.annotation
    assert cost is not None
    # a weight that falls to 0 at step 3: three steps of 256 rollouts
    assert (cost.steps, cost.requests, cost.prompt_tokens, cost.completion_tokens) == (3, 768, 768_000, 76_800)
    assert cost.money == pytest.approx(1.536 + 0.768)
    assert cost.minutes_at_rate == 12
    assert "at most 2.30 at the prices" in full_text(plan)
    assert "no annotator" in full_text(large_plan(large))


def test_a_run_that_fits_has_no_problems(demo: RunPlan) -> None:
    assert problems(demo, [Node("here", {"CPU": 5.0})]) == []
    (lack,) = problems(demo, [Node("here", {"CPU": 4.0})])
    assert "4.5 CPU" in lack


def test_what_checks_refuse_is_a_problem(large: Path) -> None:
    config = load_config([CONFIGS / "base.yaml"], [f"model.path={large}", f"data.path={EMBEDDED}"])
    plan = plan_checked(config, None)
    (refusal,) = problems(plan, [Node("here", {"CPU": 16.0})])
    assert "no tokenizer could be loaded" in refusal
    assert "The run would not start" in full_text(plan)
    zero = large_plan(large, "learner.zero_stage=0")
    assert any("learner.zero_stage is 0 and model.dtype is bfloat16" in each for each in zero.refusals)


def on_gpus(plan: RunPlan) -> list[str]:
    """What does not fit on nodes that have enough of everything."""
    return problems(plan, [Node("big", {"CPU": 999.0, "GPU": 99.0})])


def test_memory_beyond_a_gpu_is_a_problem_where_a_gpus_memory_is_known(large: Path) -> None:
    assert on_gpus(large_plan(large, gpu_gib=80)) == []
    assert on_gpus(large_plan(large, "learner.zero_stage=1")) == []  # not known
    (learner,) = on_gpus(large_plan(large, "learner.zero_stage=1", gpu_gib=70))
    assert learner.startswith("each learner rank needs about ")
    assert "gradients 30.5 GiB" in learner
    (engine, _) = on_gpus(large_plan(large, gpu_gib=20))
    # 17 - 15.26 - 2 GiB
    assert engine.startswith("the generator engine has room for 0.0 sequences of 5,120 tokens")


def test_a_fraction_of_a_gpu_must_hold_what_an_engine_takes(large: Path) -> None:
    half = "placement.generator.num_gpus=0.5"
    (problem,) = on_gpus(large_plan(large, half, gpu_gib=80))
    assert "takes 68.0 GiB of a GPU of 80.0 GiB (gpu_memory_frac), but asks Ray for 0.5" in problem
    assert on_gpus(large_plan(large, half, "generator.gpu_memory_frac=0.5", gpu_gib=80)) == []


def test_a_guest_and_its_host_must_fit_together(large: Path) -> None:
    route = "algorithm.routes={r: {selector: {tokens: all}, action: fkl}}"
    with_engine = (route, "placement.teacher_place=with_generator")
    (problem,) = on_gpus(large_plan(large, *with_engine, gpu_gib=80))
    assert problem.startswith("generator engine 0 (68.0 GiB) and the teacher (")
    assert on_gpus(large_plan(large, *with_engine, "generator.gpu_memory_frac=0.6", gpu_gib=80)) == []
    assert on_gpus(large_plan(large, route, "placement.teacher_place=with_learner", gpu_gib=80)) == []
    shared = ("generator.num_engines=8", "placement.mode=colocated", route, "placement.teacher_place=with_learner")
    (engine,) = on_gpus(large_plan(large, *shared, gpu_gib=80))
    assert engine.startswith("generator engine 7 (68.0 GiB) and the teacher (")


def test_engines_and_ranks_that_take_turns_need_room_for_the_larger_of_both(large: Path) -> None:
    plan = large_plan(large, "placement.mode=colocated", "generator.num_engines=8", gpu_gib=80)
    assert on_gpus(plan) == []
    rank = plan.forecast.of("learner rank 0")
    assert rank is not None
    assert rank.nbytes("host") == (2 + 4 + 8) * QWEN3_8B_PARAMETERS // 8
    assert plan.sync.transport == "ipc"


WARNED = [
    ("sampling.prompts_per_step=128", "a step takes 128 prompts, but the data has 64"),
    ("run.steps=700", "goes through its 64 prompts 350 times"),
    ("algorithm.dynamic_sampling.max_rounds=3", "a step may sample up to 3 times its prompts"),
    (
        "algorithm.routes={idle: {selector: {tokens: all}, action: fkl, schedule: {type: constant, value: 0}}}",
        "route idle is off at every one of 300 steps",
    ),
    ("model.trust_remote_code=true", "code that ships with the model will run"),
    ("placement.learner.num_gpus=0", "will run without a GPU, while others have one (placement.learner.num_gpus is 0)"),
    ("placement.ray_address=local", "a Ray of its own, on this machine alone"),
    ("placement.generator.num_gpus=0.5", "placement.generator.num_gpus is a fraction"),
    (
        "generator.max_concurrent_sequences=100",
        "an engine gets 256 sequences a step and runs 100 at once, so they come in 3",
    ),
    # 4,096 tokens x 16.4 GB / 3.35 TB/s
    ("placement.step_timeout_s=30", "completions of full length take an engine at least 20 s a step"),
    ("learner.schedule={type: linear, warmup_steps: 300}", "still rising when the run ends"),
    ("learner.world_size=1", "ZeRO-3 on one rank shares nothing"),
    ("algorithm.policy_gradient={type: gspo}", "the ratios of gspo are 1 and its clips never act"),
    ("algorithm.policy_gradient={type: gspo, clip_high: 0.2}", "gspo clips ratios of whole sequences at 0.2"),
    ("scheduling.max_staleness=1", "with one optimizer step they never act, however stale a token is"),
    ("sync.canary_tolerance=0.001", "so that syncs will be refused"),
    ("sync.canary_tolerance=2.0", "which wrong weights could pass in bfloat16"),
    ("sync.bucket_mib=128", "a weight of 1,187 MiB is larger than sync.bucket_mib = 128"),
    ("run.checkpoint_every=0", "the first checkpoint comes after 300 steps"),
]


@pytest.mark.parametrize(("override", "sentence"), WARNED)
def test_what_may_not_be_meant_is_told(large: Path, override: str, sentence: str) -> None:
    quiet = "sync.bucket_mib=2048"
    assert any(sentence in warning for warning in large_plan(large, quiet, override).warnings)


def test_a_run_as_it_should_be_has_no_warnings(large: Path) -> None:
    assert large_plan(large, "sync.bucket_mib=2048", rows=9600).warnings == ()


def test_packed_rows_without_flash_attention_and_a_watch_without_evaluations_are_told(large: Path) -> None:
    packed = large_plan(large, "learner.layout=packed", "model.attention=sdpa").warnings
    assert any("whose work and mask then grow with the square" in each for each in packed)
    assert not any("grow with the square" in each for each in large_plan(large, "learner.layout=packed").warnings)
    route = "algorithm.routes={r: {selector: {tokens: all}, action: fkl}}"
    blind = large_plan(large, route, "evaluation.every=0").warnings
    assert any("nothing is evaluated, so that watch.action=warn sees nothing" in each for each in blind)


def test_warnings_of_the_checks_become_part_of_the_plan() -> None:
    idle = "evaluation.chat_template_kwargs={enable_thinking: true}"
    plan = plan_checked(load_config([CONFIGS / "demo.yaml"], [idle]), None)
    assert any(warning.startswith("No effect of evaluation.chat_template_kwargs") for warning in plan.warnings)


def test_a_plan_reads_within_100_columns_and_names_every_role(demo: RunPlan, large: Path) -> None:
    route = "algorithm.routes={r: {selector: {rollouts: correct, tokens: key_spans}, action: fkl}}"
    for plan in (demo, large_plan(large, route, f"annotator.backend={json.dumps(API)}", gpu_gib=80)):
        text = full_text(plan)
        assert max(map(len, text.splitlines())) <= 100
        for role in ("generator engine 0", "learner rank 0 to", "the teacher", "the rewarder", "the annotator"):
            assert role in text
        assert short_text(plan).splitlines()[0] == text.splitlines()[0]


def test_numbers_of_the_demo_are_told(demo: RunPlan) -> None:
    text = full_text(demo)
    for line in (
        "8 prompts x 8 samples = 64 sequences a step",
        "x 640 tokens at most (512 of the prompt, 128 of the response) = 40,960 tokens",
        "-> for each, 11 micro-batches on each of 2 ranks, of 3 full sequences (2,048 tokens fit)",
        # 4 layers x 2 heads x 32 x 2 x 4 bytes
        "cache: 2 KiB a token, 1.25 MiB a sequence of 640",
        "819 of full length fit; up to 128 run at once",
        "gloo: 1.96 MiB a version (46 weights) in 1 bucket of at most 1.96 MiB, to 1 engine",
        "101 versions in the run",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (500, "500 bytes"),
        (144 * 1024, "144 KiB"),
        (2**20, "1 MiB"),
        (2.5 * GIB, "2.5 GiB"),
        (1234 * GIB, "1,234 GiB"),
    ],
)
def test_sizes_have_the_unit_that_suits_them(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_memory_of_gpus_is_known_by_their_type() -> None:
    small, large = Node("a", {"GPU": 8, "accelerator_type:H100": 1}), Node("b", {"GPU": 8, "accelerator_type:H200": 1})
    assert gpu_memory([small, large, Node("head", {"CPU": 4})]) == 81559 * 2**20
    both = Node("c", {"GPU": 1, "accelerator_type:A100": 1, "accelerator_type:A100-80G": 1})
    assert gpu_memory([both]) == 81920 * 2**20
    assert gpu_memory([small, Node("d", {"GPU": 1, "accelerator_type:other": 1})]) is None
    assert gpu_memory([small, Node("e", {"GPU": 1})]) is None
    assert gpu_memory([Node("head", {"CPU": 4})]) is None


def test_a_model_without_a_shape_is_refused_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(TraceError, match=r"^model\.path: the shape of .* cannot be read"):
        model_shape(Model(path=str(tmp_path)), LearnerSettings(), CPU)


def test_the_command_prints_a_plan_and_judges_it() -> None:
    demo = str(CONFIGS / "demo.yaml")
    fits = CliRunner().invoke(app, ["plan", demo, "--check"])
    assert fits.exit_code == 0
    assert "It fits: 1 node" in fits.stdout
    wanting = ["plan", demo, "placement.learner.num_gpus=1"]
    assert CliRunner().invoke(app, wanting).exit_code == 0  # not checked
    short = CliRunner().invoke(app, [*wanting, "--check"])
    assert short.exit_code == 1
    assert "It does not fit:" in short.stdout
    assert "learner rank 0 needs 1 GPU on one node (placement.learner.num_gpus)" in re.sub(r"\s+", " ", short.stdout)


def test_a_cluster_is_asked_what_it_has_and_nothing_is_taken(local_ray: None) -> None:
    address = ray.get_runtime_context().gcs_address
    asked = [sys.executable, "-m", "trace_rl.launch.cli", "plan", str(CONFIGS / "demo.yaml"), "--check"]
    done = subprocess.run(
        [*asked, f"placement.ray_address={address}"], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    # this session's Ray has 4 logical CPUs, and the demo asks for 4.5
    assert done.returncode == 1, done.stderr
    assert "need 4.5 CPU" in re.sub(r"\s+", " ", done.stdout)
    assert f"on Ray at {address}" in done.stdout
