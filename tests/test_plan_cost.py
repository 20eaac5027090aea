"""The time of a step: every formula by hand, what it must grow and shrink with, and what was measured."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from trace_rl.config.learner import LearnerSettings
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.flops import TransformerShape
from trace_rl.launch.cli import app
from trace_rl.launch.plan import stages
from trace_rl.launch.plan.batch import SyncPlan
from trace_rl.launch.plan.cost import (
    LONGEST,
    StepCost,
    finished_first,
    run_cost,
    running_ahead,
    scored_s,
    step_cost,
    synchronous,
)
from trace_rl.launch.plan.hardware import GPUS, Fixed, Hardware, Roofs, Shares, measured, named
from trace_rl.launch.plan.shapes import ModelShape, model_shape
from trace_rl.launch.plan.stages import Given, Stage
from trace_rl.launch.plan.time_text import bottleneck, rate, seconds, time_lines
from trace_rl.launch.plan.workload import Lengths, Workload, busy_steps, expected, routed_tokens_at_most, workload
from trace_rl.overlays import load_config
from trace_rl.tasks.arithmetic import base_model_path
from trace_rl.token_layout import Packed
from trace_rl.workers.policy_model import load_policy, transformer_shape
from trace_rl.workers.weight_wire import WeightManifest

ROOT = Path(__file__).resolve().parents[1]
ROUTE = {
    "selector": {"rollouts": "correct", "tokens": "key_spans"},
    "action": "fkl",
    "schedule": {"type": "hold_then_linear", "initial": 0.5, "hold_steps": 10, "decay_steps": 30},
}
EXACT = Shares(generation=1, teacher=1, learner=1, sync=1)
ROOFS = Roofs(matmul_flops=1000, copy_bytes_per_s=100, link_bytes_per_s=10, collective_bytes_per_s=20)
AT_ROOFS = Hardware(roofs=ROOFS, shares=EXACT, fixed=Fixed(driver_s=0))
SHAPE = ModelShape(
    # one layer of 100 weights; a table of 10 rows of 4, which is the output head too
    weights=WeightManifest.of([("table", (10, 4), torch.bfloat16), ("layer", (100,), torch.bfloat16)]),
    adapters=WeightManifest.of(()),
    num_layers=1,
    hidden=4,
    intermediate=8,
    query_width=4,
    num_kv_heads=1,
    head_dim=4,
    vocab=10,
    bytes_per_value=2,
    is_flash=True,
    layout=Packed(),
    transformer=TransformerShape(100, num_layers=1, attention_width=4, hidden=4, vocab=10),
    is_mixture=False,
)
WEIGHTS = 280
"""Bytes of them."""
WORK = Workload(
    prompts=4,
    samples=2,
    prompt_tokens=10,
    responses=Lengths((20.0,), 20.0),
    context_tokens=5,
    routed_rollouts_frac=0.5,
    routed_tokens_frac=0.1,
    routed_reach_frac=0.5,
    annotation_s=0,
    is_at_full_length=False,
)


def config(**sections: Any) -> RunConfig:
    """4 prompts x 2 samples of 10 + 20 tokens, two engines, two ranks under ZeRO-2."""
    wanted = {
        "sampling": {
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "max_prompt_tokens": 10,
            "max_response_tokens": 20,
        },
        "generator": {"num_engines": 2},
        "learner": {"world_size": 2, "max_tokens_per_micro_batch": 60},
        "algorithm": {"routes": {"key": ROUTE}},
        "run": {"steps": 100},
    }
    for name, settings_ in sections.items():
        wanted[name] = {**wanted.get(name, {}), **settings_}
    return RunConfig.model_validate({"model": {"path": "none"}, "data": {"path": "none"}, **wanted})


def given_of(work: Workload = WORK, hardware: Hardware = AT_ROOFS, **sections: Any) -> Given:
    transport = sections.pop("transport", "nccl")
    cache = sections.pop("cache_bytes", None)
    sync = SyncPlan(transport, WEIGHTS, 2, 1, WEIGHTS, WEIGHTS, 2, 1)
    return Given(config(**sections), SHAPE, SHAPE, sync, cache, work, hardware)


BUSY = list(range(40))
"""Steps with a weight above 0: 10 held, and 30 in which it falls to 0."""


def test_work_is_counted_from_config_json_as_from_the_loaded_model() -> None:
    model = Model(path=str(base_model_path()), dtype="float32")
    policy = load_policy(model, torch.device("cpu"))
    shape = model_shape(model, LearnerSettings(), torch.device("cpu"))
    assert shape.transformer == transformer_shape(policy, shape.vocab)
    assert not shape.is_mixture


def test_writing_reads_weights_once_a_token_step_and_every_context() -> None:
    done = stages.decoding(given_of(), is_steady=False)
    # two of four prompts an engine, two samples each
    assert (done.sequences, done.at_once, done.token_steps) == (4, 4, 20)
    # a token step reads (100 + 40) x 2 bytes of weights; a token has 2 x 4 x 2 = 16 bytes of keys and values
    assert done.nbytes == 20 * 280 + 4 * (10 * 20 + 200) * 16
    # F(T, R) = 200 T + 8 T^2 + 80 R: F(30, 20) = 14,800 and F(10, 0) = 2,800
    assert done.flops == 4 * (14_800 - 2_800)
    assert done.prefill_flops == 2 * (2_800 + 80)
    stage = stages.generation(given_of())
    assert stage.roof_s == pytest.approx(312 + 5.76)
    assert (stage.bound, stage.rounds) == ("memory", 20)


def test_a_full_engine_works_in_waves_and_the_last_ends_with_the_longest() -> None:
    work = replace(WORK, responses=Lengths((10.0, 20.0), 30.0))
    narrow = given_of(work, generator={"num_engines": 1, "max_concurrent_sequences": 2})
    # 8 sequences, 2 at once: the longest, and three more waves of 15 on average
    assert stages.decoding(narrow, is_steady=False).token_steps == 30 + 3 * 15
    assert stages.decoding(narrow, is_steady=True).token_steps == 4 * 15
    # 3 sequences of 10 + 15 tokens of 16 bytes fit
    tight = given_of(work, generator={"num_engines": 1}, cache_bytes=1200)
    assert stages.decoding(tight, is_steady=False).at_once == 3


def test_what_is_being_written_at_a_sync_is_read_again() -> None:
    ahead = {"max_staleness": 1}
    resumed = stages.decoding(given_of(scheduling=ahead), is_steady=True)
    kept = stages.decoding(given_of(scheduling={**ahead, "partial": "keep"}), is_steady=True)
    # twice the sequences of a step are in flight: 8 an engine, half written: F(20, 1) = 4,000 + 3,200 + 80
    assert resumed.at_once == 8
    assert resumed.prefill_flops - kept.prefill_flops == 8 * 7_280
    # and they share the token steps of 4
    assert resumed.token_steps == 10


def test_tensor_parallel_workers_share_weights_and_heads_that_can_be_shared() -> None:
    shared = given_of(generator={"num_engines": 2, "tensor_parallel": 2})
    done = stages.decoding(shared, is_steady=False)
    # one head of keys cannot be halved
    assert done.nbytes == 20 * 140 + 1600 * 16
    assert done.flops == 24_000


def test_the_teacher_reads_routed_rollouts_up_to_their_last_span() -> None:
    stage = stages.teacher(given_of(), BUSY)
    # 4 rollouts of 10 + 5 + 10 tokens: F(25, 0) = 5,000 + 5,000
    assert stages.teacher_flops(given_of(), 0) == 40_000
    # states of 16 rows of 4 values of 2 bytes; the policy's weights at 4 of 40 steps
    assert stage.roof_s == pytest.approx(40 + (128 + 28) / 10)
    assert stage.bound == "products"
    assert stage.rounds == 1  # a call with all four prompts
    assert stages.teacher(given_of(teacher={"max_tokens_per_batch": 50}), BUSY).rounds == 4  # prompt by prompt
    alone = {"max_tokens_per_batch": 100}
    assert stages.teacher(given_of(teacher=alone, placement={"mode": "colocated"}), BUSY).rounds == 1
    assert stages.teacher(given_of(teacher={"max_tokens_per_batch": 20}), BUSY).rounds == 4 * 25 / 20
    assert stages.teacher(given_of(), ()).seconds == 0
    assert stages.refresh_s(given_of(), BUSY) == 2.8
    assert stages.refresh_s(given_of(), ()) == 0


def test_a_teacher_of_log_probs_projects_routed_rows_and_sends_no_states() -> None:
    read = given_of(algorithm={"routes": {"key": {**ROUTE, "action": "pg_logratio"}}})
    # a fifth of the 20 tokens of a routed rollout: 80 operations a row
    assert stages.teacher_flops(read, 0) == 4 * (10_000 + 4 * 80)
    assert stages.teacher(read, BUSY).roof_s == pytest.approx(41.28 + 2.8)


def test_the_learner_computes_three_passes_and_recomputes_a_fourth() -> None:
    # 8 sequences of F(30, 0) = 13,200 and 20 x 80 of the head
    assert stages.learner_flops(given_of(), False) == 8 * (3 * 13_200 + 3 * 1_600)
    assert stages.learner_flops(given_of(learner={"gradient_checkpointing": True}), False) == 8 * (52_800 + 4_800)
    # a tenth of the tokens meets the teacher's head
    assert stages.learner_flops(given_of(), True) == pytest.approx(8 * (39_600 + 3.1 * 1_600))
    twice = given_of(learner={"minibatches_per_step": 2})
    assert stages.learner_flops(twice, False) == 8 * (52_800 + 6_400)
    # the prompt of 10 tokens, F(10, 0) = 2,000 + 800, is computed for one of two samples
    shared = given_of(learner={"layout": "shared"})
    assert stages.learner_flops(shared, False) == pytest.approx(8 * (3 * (13_200 - 1_400) + 4_800))
    adapters = replace(given_of(), shape=replace(SHAPE, adapters=WeightManifest.of([("a", (14,), torch.bfloat16)])))
    assert stages.learner_flops(adapters, False) == pytest.approx(8 * (2.1 * 13_200 + 4_800))


@pytest.mark.parametrize(
    ("stage", "nbytes"),
    # 140 weights: gradients of 560 bytes, weights of 280; half of it comes from the other rank
    [(0, 2 * 560), (1, 560 + 280), (2, 2 * 560 + 280), (3, 2 * (2 * 280 + 560))],
)
def test_what_ranks_send_each_other(stage: int, nbytes: int) -> None:
    given_ = given_of(learner={"zero_stage": stage})
    # 8 sequences of 30 tokens on 2 ranks: 120 tokens, 60 a pass
    assert stages.learner_passes(given_) == 2
    # or of 25, where two have a prompt in common: 100 tokens
    short = given_of(learner={"zero_stage": stage, "layout": "shared", "max_tokens_per_micro_batch": 100})
    assert stages.learner_passes(short) == 1
    assert stages.learner_link_bytes(given_) == nbytes / 2


def test_a_rank_takes_as_long_as_its_products_or_as_what_it_waits_for() -> None:
    computing = stages.learner(given_of(), False)
    assert (computing.roof_s, computing.bound, computing.rounds) == (pytest.approx(177.6), "products", 2)
    slow_link = AT_ROOFS.model_copy(update={"roofs": ROOFS.model_copy(update={"collective_bytes_per_s": 1.0})})
    waiting = stages.learner(given_of(hardware=slow_link), False)
    assert (waiting.roof_s, waiting.bound) == (700, "link")
    plain = ROOFS.model_copy(update={"collective_bytes_per_s": 0.0})
    assert plain.ring_bytes_per_s == plain.link_bytes_per_s == 10


def test_a_sync_moves_the_weights_once() -> None:
    assert stages.sync(given_of()).roof_s == 28
    gathered = stages.sync(given_of(learner={"zero_stage": 3}))
    assert (gathered.roof_s, gathered.bound) == (28 + 140 / 20, "link")
    shared = stages.sync(given_of(transport="ipc"))
    assert (shared.roof_s, shared.bound) == (5.6, "memory")


def test_shares_and_fixed_times_come_on_top_of_the_roofs() -> None:
    hardware = Hardware(roofs=ROOFS, shares=Shares(sync=0.25), fixed=Fixed(sync_s=100, driver_s=0.5, grading_s=3))
    stage = stages.sync(given_of(hardware=hardware))
    assert (stage.roof_s, stage.seconds, stage.bound) == (28, 28 / 0.25 + 100, "link")
    slow = hardware.model_copy(update={"fixed": Fixed(sync_s=200)})
    assert stages.sync(given_of(hardware=slow)).bound == "overhead"
    assert stages.driver(given_of(hardware=hardware)).seconds == 4
    # 8 rollouts in two processes
    assert stages.grading(given_of(hardware=hardware)).seconds == 12


def test_a_model_that_annotates_is_held_up_by_its_latency_or_its_rate() -> None:
    api = {"type": "api", "base_url": "http://127.0.0.1:1/v1", "name": "m"}
    work = replace(WORK, annotation_s=6)
    quick = {"backend": {**api, "limits": {"concurrency": 4}}}
    assert stages.annotation(given_of(work, annotator=quick), True).seconds == 8 * 6 / 4
    limited = {"backend": {**api, "limits": {"concurrency": 4, "requests_per_minute": 10}}}
    assert stages.annotation(given_of(work, annotator=limited), True).seconds == 8 * 6
    assert stages.annotation(given_of(work, annotator=limited), False).seconds == 0
    assert stages.annotation(given_of(work), True).seconds == 0  # a rule
    # generation takes longer, so that only the last reply is waited for
    with_, without = (step_cost(given_of(each, annotator=quick), BUSY).seconds for each in (work, WORK))
    assert with_ - without == pytest.approx(6)


def of(name: str, seconds_: float) -> Stage:
    return Stage(name, seconds_, 0, seconds_, "products")


AFTER = [of("teacher", 1), of("learner", 4), of("sync", 2)]


def test_who_waits_for_whom() -> None:
    ahead = [of("generation", 5), of("grading", 6)]
    step = synchronous(ahead, 0.5, AFTER)
    assert (step.seconds, step.bottleneck) == (6 + 0.5 + 7, "grading")
    assert step.busy_frac("learner") == 4 / 13.5
    # a teacher that works beside generation, and is done later
    beside = synchronous([*ahead, of("teacher", 9)], 0.5, AFTER[1:], supplied_s=10)
    assert beside == StepCost((*ahead, of("teacher", 9), *AFTER[1:]), 10.5 + 6, "teacher")
    # the next rollouts are written while this step learns, and a sync waits for both
    assert finished_first(ahead, 0.5, AFTER).seconds == 6.5 + 2
    assert finished_first([of("generation", 1)], 0.0, AFTER).seconds == 5 + 2
    # the learner's side takes 7; a response of 20 s may be 2 steps old
    assert running_ahead(ahead, 8, AFTER, 2) == StepCost((*ahead, *AFTER), 7, "learner")
    tail = running_ahead(ahead, 20, AFTER, 2)
    assert (tail.seconds, tail.bottleneck) == (10, LONGEST)
    assert running_ahead([of("generation", 9)], 8, AFTER, 2).bottleneck == "generation"


def test_a_teacher_scores_a_prompt_once_its_longest_response_is_written() -> None:
    pairs = replace(WORK, responses=Lengths((10.0, 20.0), 20.0), prompts=4, samples=2)
    # a quarter of the prompts has short responses only. 8 s of 16 s are scored behind the first half of 20 s at the
    # latest, and 3/4 of 16 s behind the second
    assert scored_s(20, 16, pairs, together=1) == 20 + 16 * 3 / 4
    assert scored_s(20, 16, pairs, together=2) == 20 + 16 * 15 / 16  # four responses have to be short
    assert scored_s(20, 100, pairs, together=1) == 20 / 2 + 100  # it is never idle from the first prompt on
    longer = replace(pairs, responses=Lengths((10.0, 20.0), 80.0))
    assert scored_s(20, 4, longer, together=1) == 20 + 4 / 4  # one response of all is that long
    assert scored_s(20, 16, replace(WORK, responses=Lengths((20.0,), 20.0)), together=1) == 20 + 16


def test_a_run_has_steps_with_and_without_routes() -> None:
    cost = run_cost(given_of())
    assert cost.with_routes is not None
    assert (cost.num_with_routes, cost.num_steps) == (40, 100)
    # generation, learner, sync, and the teacher without its weights: all responses end at once
    assert cost.without_routes.seconds == pytest.approx(317.76 + 177.6 + 28)
    learner_s = 177.6 + 8 * 0.1 * 1.6 / 2
    assert cost.with_routes.seconds == pytest.approx(317.76 + 52.8 + learner_s + 28)
    # where replies of a model take longer than generation, the teacher's last call comes behind these: 8 x 120 s
    model = {"type": "api", "base_url": "http://127.0.0.1:1/v1", "name": "m", "limits": {"concurrency": 1}}
    asked = run_cost(given_of(work=replace(WORK, annotation_s=120), annotator={"backend": model})).with_routes
    assert asked is not None and asked.seconds == pytest.approx(960 + 52.8 + 120 + learner_s + 28)
    late = run_cost(given_of(scheduling={"oversampling_frac": 0.25, "late": "drop"})).with_routes
    assert late is not None and late.seconds == pytest.approx(317.76 + 55.6 + learner_s + 28)
    assert cost.seconds == pytest.approx(40 * cost.with_routes.seconds + 60 * cost.without_routes.seconds)
    grpo = run_cost(given_of(algorithm={"routes": {}}))
    assert (grpo.with_routes, grpo.num_with_routes) == (None, 0)
    assert grpo.seconds == pytest.approx(100 * cost.without_routes.seconds)


sizes = st.integers(1, 12)
shares = st.floats(0.05, 1)
works = st.builds(
    Workload,
    prompts=sizes,
    samples=sizes,
    prompt_tokens=st.floats(1, 50),
    responses=st.builds(
        lambda mean, sigma: Lengths.log_normal(mean, sigma, 400, 8), st.floats(1, 200), st.floats(0, 2)
    ),
    context_tokens=st.floats(0, 20),
    routed_rollouts_frac=shares,
    routed_tokens_frac=st.just(0.05),
    routed_reach_frac=shares,
    annotation_s=st.floats(0, 5),
    is_at_full_length=st.just(False),
)
scheduling = st.sampled_from(
    [{}, {"max_staleness": 1}, {"max_staleness": 3}, {"max_staleness": 1, "partial": "finish"}]
)
GROWN: dict[str, Any] = {
    "prompts": lambda work: work.prompts + 1,
    "samples": lambda work: 2 * work.samples,
    "prompt_tokens": lambda work: work.prompt_tokens + 1,
    "context_tokens": lambda work: work.context_tokens + 1,
    "responses": lambda work: Lengths(tuple(1.1 * r for r in work.responses.quantiles), 1.1 * work.responses.longest),
    "routed_tokens_frac": lambda work: 2 * work.routed_tokens_frac,
    "routed_reach_frac": lambda work: min(1, 1.5 * work.routed_reach_frac),
}


@pytest.mark.parametrize("dimension", GROWN)
@settings(max_examples=40, deadline=None)
@given(work=works, ahead=scheduling, cache=st.sampled_from([None, 3000]))
def test_more_work_takes_no_less_time(dimension: str, work: Workload, ahead: dict[str, Any], cache: int | None) -> None:
    more = replace(work, **{dimension: GROWN[dimension](work)})
    took, takes = (step_cost(given_of(each, scheduling=ahead, cache_bytes=cache), BUSY) for each in (work, more))
    assert takes.seconds >= took.seconds * (1 - 1e-12)
    for stage in took.stages:
        assert takes.of(stage.name).seconds >= stage.seconds * (1 - 1e-12), stage.name


@settings(max_examples=40, deadline=None)
@given(work=works, engines=sizes, ranks=sizes)
def test_more_engines_and_ranks_take_no_more_time(work: Workload, engines: int, ranks: int) -> None:
    quick_link = ROOFS.model_copy(update={"collective_bytes_per_s": 1e12})
    hardware = AT_ROOFS.model_copy(update={"roofs": quick_link})

    def took(engines_: int, ranks_: int) -> StepCost:
        sections = {"generator": {"num_engines": engines_}, "learner": {"world_size": ranks_}}
        return step_cost(given_of(work, hardware, **sections), BUSY)

    base = took(engines, ranks)
    assert took(engines + 1, ranks).of("generation").seconds <= base.of("generation").seconds
    assert took(engines, ranks + 1).of("learner").seconds <= base.of("learner").seconds * (1 + 1e-12)
    # twice the ranks halve the products exactly
    assert took(engines, 2 * ranks).of("learner").roof_s == pytest.approx(base.of("learner").roof_s / 2)


@settings(max_examples=40, deadline=None)
@given(work=works)
def test_half_the_hardware_takes_twice_the_time(work: Workload) -> None:
    halved = Roofs(**{name: value / 2 for name, value in ROOFS.model_dump().items()})
    base, slow = (
        step_cost(given_of(work, AT_ROOFS.model_copy(update={"roofs": roofs}), annotator={}), BUSY)
        for roofs in (ROOFS, halved)
    )
    assert slow.seconds == pytest.approx(2 * base.seconds)


def test_half_the_bandwidth_doubles_what_is_bound_by_memory_alone() -> None:
    halved = AT_ROOFS.model_copy(update={"roofs": ROOFS.model_copy(update={"copy_bytes_per_s": 50.0})})
    base, slow = (stages.generation(given_of(hardware=each)) for each in (AT_ROOFS, halved))
    # prompts are read at the speed of products
    assert slow.roof_s - 5.76 == pytest.approx(2 * (base.roof_s - 5.76))
    assert stages.learner(given_of(hardware=halved), True) == stages.learner(given_of(), True)


def test_lengths_of_a_log_normal() -> None:
    lengths = Lengths.log_normal(100, 1.0, 10_000, 128)
    # mean exp(mu + 1/2), mean square exp(2 mu + 2); the tail beyond the last of 64 quantiles is missing from both
    assert lengths.mean == pytest.approx(100, rel=0.03)
    assert lengths.mean_square == pytest.approx(100**2 * math.e, rel=0.25)
    # the quantile 128 / 129 is 2.42 sigma above the median
    assert lengths.longest == pytest.approx(100 * math.exp(2.42 - 0.5), rel=0.01)
    assert Lengths.log_normal(100, 1.0, 300, 128).longest == 300
    assert Lengths.log_normal(100, 0.0, 300, 128) == Lengths((100.0,) * 64, 100.0)
    assert Lengths.of([3, 1]) == Lengths((1.0, 3.0), 3.0)


def test_what_is_expected_of_a_step() -> None:
    base = config()
    full = workload(base, expected([]))
    assert full.is_at_full_length
    assert (full.prompt_tokens, full.responses.mean, full.responses.longest) == (10, 20, 20)
    assert (full.routed_rollouts_frac, full.routed_tokens_frac) == (1, 0.25)  # annotator.coverage_cap
    known = workload(base, expected(["response_tokens=8", "response_spread=0", "routed_rollouts_frac=0.5"]))
    assert not known.is_at_full_length
    assert (known.responses.mean, known.routed_tokens_frac) == (8, 0.125)
    with pytest.raises(ConfigError, match="unknown key response_token; did you mean 'response_tokens'"):
        expected(["response_token=8"])


@pytest.mark.parametrize(
    ("preset", "share"),
    [("trace_fkl", 0.25), ("trace_both", 0.25), ("sdpo", 1.0), ("grpo", 0.0)],
)
def test_what_routes_may_take_of_a_response(preset: str, share: float) -> None:
    loaded = load_config(
        [ROOT / "configs/base.yaml", ROOT / f"configs/methods/{preset}.yaml"], ["model.path=none", "data.path=none"]
    )
    assert routed_tokens_at_most(loaded) == share
    assert bool(busy_steps(loaded)) == (share > 0)


def test_roofs_are_read_from_what_the_bench_writes(tmp_path: Path) -> None:
    file = tmp_path / "bench_node.json"
    roofs = {"matmul_flops": 7e14, "copy_bytes_per_s": 3e12, "link_bytes_per_s": 4.5e10}
    file.write_text(json.dumps({"machine": {"gpu": "any"}, "roofs": roofs, "shares": {"learner": 0.5}}))
    found = measured(file)
    assert (found.roofs.copy_bytes_per_s, found.shares.learner, found.shares.sync) == (3e12, 0.5, 0.25)
    file.write_text(json.dumps({"roofs": {**roofs, "matmul_flops": 0}}))
    with pytest.raises(ConfigError, match=r"bench_node\.json:1: roofs\.matmul_flops is 0"):
        measured(file)
    with pytest.raises(ConfigError, match="--gpu is H9000, whose data sheet is not known here; give one of A100-80G"):
        named("H9000")
    assert named("H200").roofs.copy_bytes_per_s == GPUS["H200"].copy_bytes_per_s == 4.8e12


def test_the_section_of_a_plan_says_what_bounds_a_step() -> None:
    lines = list(time_lines(run_cost(given_of()), given_of(), "some GPU"))
    assert lines[0].startswith("some GPU: 1,000 FLOP/s, memory 100 B/s, link 10 B/s a device; ")
    assert lines[3].split() == ["generation", "5.3", "min", "5.3", "min", "55%", "memory", "bandwidth"]
    text = "\n".join(lines)
    assert "bottleneck: generation, by memory bandwidth" in text
    assert "idle: engines 45%, teacher 90%, learner 69% of a step" in text
    assert "that is a step in which routes read the teacher, 40 of 100; the other 60 take 8.72 min each" in text
    assert lines[-1] == "taken to cost no time, because it is not known: grading (fixed.grading_s of --roofs)"
    asked = given_of(annotator={"backend": {"type": "api", "base_url": "http://127.0.0.1:1/v1", "name": "m"}})
    assert list(time_lines(run_cost(asked), asked, ""))[-1].endswith(
        "the annotator's replies (--expect annotation_s=SECONDS)"
    )
    assert bottleneck(StepCost((), 1, LONGEST)) == "the longest response, within scheduling.max_staleness"
    told = [seconds(value) for value in (7200, 150, 90.0, 0.0125, 5e6)]
    assert told == ["2 h", "2.5 min", "90 s", "12.5 ms", "1,389 h"]
    assert [rate(value, "B/s") for value in (3.35e12, 5e10, 12)] == ["3.35 TB/s", "50 GB/s", "12 B/s"]


def test_the_command_shows_times_only_where_roofs_are_given() -> None:
    demo = str(ROOT / "configs/demo.yaml")
    told = CliRunner().invoke(app, ["plan", demo])
    assert "no measured roofs" in told.stdout and "bottleneck" not in told.stdout
    shown = CliRunner().invoke(app, ["plan", demo, "--gpu", "H100", "--expect", "response_tokens=60"])
    assert shown.exit_code == 0, shown.output
    assert "H100 by its data sheet" in shown.stdout and "bottleneck: " in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    both = CliRunner().invoke(app, ["plan", demo, "--gpu", "H100", "--roofs", "x.json"])
    assert both.exit_code == 1 and "are both given" in both.output
