"""Chats on a real engine beside rollouts: guided JSON, timeouts, and syncs that win; and which engine is asked."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from vllm_server import write_random_model

from trace_rl.annotation_prompts import Message
from trace_rl.batch import Prompt, Rollout, RolloutRequest
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.errors import WeightSyncError
from trace_rl.protocols import Decoding
from trace_rl.workers.adapters import Adapter
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatRequest
from trace_rl.workers.engine_chat import EngineChat
from trace_rl.workers.generator import VllmGenerator
from trace_rl.workers.generator_engine import ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.waiting import wait_for
from trace_rl.workers.weight_sender import WeightSender
from trace_rl.workers.weight_wire import TransferGroup, WeightManifest, free_address

pytestmark = pytest.mark.engine

MAX_MODEL_LEN = 2048
NUMBER = {"type": "integer", "minimum": 1, "maximum": 40}
SPAN = {
    "type": "object",
    "properties": {"start": NUMBER, "end": NUMBER, "type": {"enum": ["slip", "missing_case"]}},
    "required": ["start", "end", "type"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"spans": {"type": "array", "items": SPAN, "minItems": 1, "maxItems": 3}},
    "required": ["spans"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": NUMBER, "minItems": 2000}
"""Takes more tokens than an engine holds."""


def chat(number: int = 0, version: int = 0, **changes: Any) -> ChatRequest:
    """Asks about a text that depends on the number."""
    messages = (Message("system", "Mark what is wrong."), Message("user", f"Start with {number}. Add {number + 7}."))
    return replace(ChatRequest(messages, SCHEMA, 200, 1.0, policy_version=version), **changes)


def endless(version: int = 0) -> ChatRequest:
    return chat(version=version, schema=ENDLESS, max_tokens=1900)


class OpenEngine(GeneratorEngine):
    """A real engine that tells how busy it is, and can be broken."""

    def num_running(self) -> int:
        return self._thread.run(self._llm.llm_engine.get_num_unfinished_requests)

    def break_steps(self) -> None:
        def step() -> None:
            raise MemoryError("no memory left for the KV cache")

        self._llm.llm_engine.step = step  # type: ignore[method-assign]


class Learner:
    """Sends weights to one engine out of this process."""

    def __init__(self, model: Any, engine: Any) -> None:
        self._model = model
        self._engine = engine
        weights = model.named_parameters()
        self._manifest = WeightManifest.of((name, tuple(weight.shape), weight.dtype) for name, weight in weights)
        self._sender = WeightSender(self._manifest, "gloo")
        group = TransferGroup(*free_address(is_single_node=True), world_size=2, bucket_mib=1, timeout_s=30)
        joined = engine.join_transfer.remote(group, 1)
        self._sender.connect(group)
        ray.get(joined, timeout=30)

    def sync(self, version: int) -> None:
        receipt = self.send(version)
        assert receipt.version == version
        ray.get(self._engine.accept.remote(version), timeout=30)

    def send(self, version: int) -> Any:
        """What the engine reports of the weights that it has taken."""
        receipt = self._engine.receive_weights.remote(self._manifest, version)
        digest = self._sender.send((name, weight.detach()) for name, weight in self._model.named_parameters())
        received = wait_for(receipt, 30, "the engine", "receiving")
        assert received.digest == digest
        return received


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the byte-level tokenizer of the embedded task, which can spell any JSON."""
    path = tmp_path_factory.mktemp("bytes")
    write_random_model(path)
    return path


def start_engine(folder: Path) -> Any:
    actor = ray.remote(OpenEngine).options(num_cpus=1, max_concurrency=ENGINE_THREADS)
    model = Model(path=str(folder), dtype="float32")
    engine = actor.remote(0, model, GeneratorSettings(max_concurrent_sequences=16), MAX_MODEL_LEN, backend="gloo")
    ray.get(engine.ready.remote(), timeout=180)
    return engine


@pytest.fixture(scope="module")
def engine(local_ray: None, folder: Path) -> Iterator[Any]:
    started = start_engine(folder)
    yield started
    ray.kill(started)


@pytest.fixture(scope="module")
def learner(engine: Any, folder: Path) -> Learner:
    from transformers import AutoModelForCausalLM

    made = Learner(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), engine)
    made.sync(0)
    return made


def answer(engine: Any, request: ChatRequest, timeout_s: float = 60.0) -> ChatAnswer:
    said: ChatAnswer = wait_for(engine.complete.remote(request, timeout_s), 60, "the engine", "answering")
    return said


def wait_until_running(engine: Any, count: int) -> None:
    deadline = time.monotonic() + 20
    while ray.get(engine.num_running.remote(), timeout=20) != count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fault_of(reference: Any) -> ChatFault:
    with pytest.raises(ChatFault) as fault:
        wait_for(reference, 30, "the engine", "answering")
    return fault.value


def rollout_requests(count: int) -> list[RolloutRequest]:
    prompts = [Prompt(f"p{number}", "question", "answer") for number in range(4)]
    return [
        RolloutRequest(prompts[n % 4], n // 4, tuple(10 + (7 * n % 4 + 3 * t) % 300 for t in range(60)), seed=n)
        for n in range(count)
    ]


def sample(engine: Any, count: int) -> dict[Any, Rollout]:
    generator = VllmGenerator([engine], 60, timeout_s=60)
    return {rollout.key: rollout for rollout in generator.generate(rollout_requests(count), Decoding(1.0))}


def test_a_random_model_answers_in_the_schema_s_form(engine: Any, learner: Learner) -> None:
    said = [answer(engine, chat(number)) for number in range(6)]
    for one in said:
        spans = json.loads(one.text)["spans"]
        assert 1 <= len(spans) <= 3
        assert all(span.keys() == {"start", "end", "type"} for span in spans)
        assert all(1 <= span["start"] <= 40 and span["type"] in ("slip", "missing_case") for span in spans)
        assert " " not in one.text and "\n" not in one.text
    assert len({one.text for one in said}) > 2
    assert answer(engine, chat(3)) == said[3]  # seeded


def test_tokens_are_counted_and_temperature_0_is_greedy(engine: Any, learner: Learner, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    cold = answer(engine, chat(temperature=0.0))
    rendered = "<|system|>Mark what is wrong.<|user|>Start with 0. Add 7.<|assistant|>"
    assert cold.prompt_tokens == len(tokenizer.encode(rendered))
    assert cold.completion_tokens >= len(tokenizer.encode(cold.text))  # a random model may spell a word in pieces
    assert answer(engine, chat(temperature=0.0)).text == cold.text
    assert answer(engine, chat(max_tokens=5, temperature=0.0)).text == cold.text[: len('{"spa')]


def test_rollouts_are_the_same_beside_chats_and_chats_overtake_those_that_wait(engine: Any, learner: Learner) -> None:
    # 96 rollouts of up to 60 tokens in 16 places: six waves.
    alone = sample(engine, 96)
    stream = VllmGenerator([engine], 60, timeout_s=60).generate(rollout_requests(96), Decoding(1.0))
    beside = {(first := next(stream)).key: first}
    chats = [engine.complete.remote(chat(number), 60) for number in range(24)]
    ray.wait(chats, num_returns=24, timeout=60)
    assert ray.get(engine.num_running.remote()) > 0  # all chats were answered before the rollouts ended
    beside |= {rollout.key: rollout for rollout in stream}
    assert beside.keys() == alone.keys()
    for key, rollout in beside.items():
        assert rollout.token_ids == alone[key].token_ids
        np.testing.assert_allclose(rollout.rollout_logprobs, alone[key].rollout_logprobs, atol=1e-4)
    assert all(json.loads(said.text)["spans"] for said in ray.get(chats))


def test_scores_are_the_same_beside_chats(engine: Any, learner: Learner) -> None:
    sequences = [tuple(range(20, 60)), (3, 250, 7, 7)]
    alone = ray.get(engine.score.remote(sequences), timeout=30)
    running = engine.complete.remote(endless(), 60)
    wait_until_running(engine, 1)
    beside = ray.get(engine.score.remote(sequences), timeout=30)
    for ours, theirs in zip(alone, beside, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ray.get(engine.num_running.remote()) == 1
    learner.sync(0)
    assert fault_of(running).cause == "timeout"


def test_a_chat_that_takes_too_long_is_ended(engine: Any, learner: Learner) -> None:
    asked = time.monotonic()
    fault = fault_of(engine.complete.remote(endless(), 0.2))
    assert (fault.cause, fault.is_final) == ("timeout", False)
    assert "did not answer a chat request within 0.2 s" in str(fault)
    assert 0.2 <= time.monotonic() - asked < 2
    assert ray.get(engine.num_running.remote()) == 0


def test_a_chat_that_does_not_fit_is_refused_before_it_is_sent(engine: Any, learner: Learner) -> None:
    fault = fault_of(engine.complete.remote(chat(max_tokens=2040), 60))
    assert (fault.cause, fault.is_final) == ("too_long", True)
    assert "may be answered with 2040, but generator engine 0 holds 2048" in str(fault)


def test_new_weights_end_the_chats_that_run_and_refuse_those_for_the_old(engine: Any, learner: Learner) -> None:
    learner.sync(1)
    running = [engine.complete.remote(endless(version=1), 60) for _ in range(3)]
    wait_until_running(engine, 3)
    learner.send(2)
    for reference in running:
        fault = fault_of(reference)
        assert (fault.cause, fault.is_final) == ("timeout", True)
        assert "before the weights of version 2 replaced its own" in str(fault)
    assert "holds unproven weights, and the request is for version 2" in str(fault_of(asked(engine, 2)))
    ray.get(engine.accept.remote(2), timeout=30)
    stale = fault_of(asked(engine, 1))
    assert (stale.cause, stale.is_final) == ("timeout", True)
    assert "holds version 2, and the request is for version 1" in str(stale)
    assert json.loads(answer(engine, chat(version=2)).text)["spans"]
    assert {version for rollout in sample(engine, 8).values() for version in rollout.token_versions} == {2}
    learner.sync(0)


def asked(engine: Any, version: int) -> Any:
    return engine.complete.remote(chat(version=version), 60)


def test_new_adapters_end_chats_as_well(engine: Any, learner: Learner) -> None:
    running = engine.complete.remote(endless(), 60)
    wait_until_running(engine, 1)
    with pytest.raises(WeightSyncError, match="could not load the adapters of version 1"):  # made for all weights
        wait_for(engine.load_adapter.remote(Adapter({}, {}), 1), 30, "the engine", "loading")
    assert "before the weights of version 1 replaced its own" in str(fault_of(running))
    learner.sync(0)


def test_rollouts_do_not_give_way(engine: Any, learner: Learner) -> None:
    stream = engine.generate.options(num_returns="streaming").remote(rollout_requests(64), Decoding(1.0), 60)
    wait_until_running(engine, 64)
    with pytest.raises(WeightSyncError, match="kept its prefix cache after version 1 arrived, because requests still"):
        learner.send(1)
    with pytest.raises(WeightSyncError, match="but version 0 was the proven one"):
        for reference in stream:
            wait_for(reference, 30, "the engine", "sampling")
    learner.sync(0)


def ask(model: EngineChat, *requests: ChatRequest, timeout_s: float = 30.0) -> list[Any]:
    """Answers, or the faults instead."""

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(model.ask(request, timeout_s) for request in requests), return_exceptions=True)

    return asyncio.run(gathered())


def test_an_engine_that_fails_costs_answers_only(local_ray: None, folder: Path) -> None:
    engine = start_engine(folder)
    ray.get(engine.accept.remote(0), timeout=30)
    model = EngineChat([engine], "self:run")
    assert json.loads(ask(model, chat())[0].text)["spans"]
    ray.get(engine.break_steps.remote(), timeout=30)
    for fault in ask(model, chat(), endless()) + ask(model, chat()):
        assert isinstance(fault, ChatFault) and (fault.cause, fault.is_final) == ("unreachable", True)
        assert "generator engine 0 has failed in a step of vLLM (MemoryError('no memory left" in str(fault)
    ray.kill(engine)
    for _ in range(100):  # a process that is being killed may still answer, as above
        (fault,) = ask(model, chat())
        assert isinstance(fault, ChatFault) and (fault.cause, fault.is_final) == ("unreachable", True)
        if "engine 0 of the annotator died while answering a chat request" in str(fault):
            return
        time.sleep(0.1)
    pytest.fail(f"the engine's death never showed: {fault}")


class FakeEngine:
    """Answers with the name of its process, faults, or hangs, as the text says."""

    def complete(self, request: ChatRequest, timeout_s: float) -> ChatAnswer:
        text = request.messages[-1].content
        if text == "hang":
            time.sleep(3)
        if text == "fault":
            raise ChatFault("not now", "rate_limited", retry_after_s=4.0)
        return ChatAnswer(f"{os.getpid()} {threading.get_ident()}", 1, 1)


def test_requests_that_share_a_prefix_go_to_the_same_engine_and_all_engines_are_used(local_ray: None) -> None:
    engines = [ray.remote(FakeEngine).options(num_cpus=0.1).remote() for _ in range(2)]
    model = EngineChat(engines, "static:weights")
    groups = [f"p{number}" for number in range(8)]
    requests = [chat(number, affinity=group) for number in range(3) for group in groups]
    processes = [said.text.split()[0] for said in ask(model, *requests)]
    assert processes[:8] == processes[8:16] == processes[16:]
    assert len(set(processes)) == 2
    assert model.identity == "static:weights"
    for engine in engines:
        ray.kill(engine)


def test_faults_arrive_whole_and_an_engine_that_hangs_is_not_waited_for(local_ray: None) -> None:
    engine = ray.remote(FakeEngine).options(num_cpus=0.1, max_concurrency=2).remote()
    model = EngineChat([engine], "frozen", grace_s=0.1)
    (fault,) = ask(model, chat(messages=(Message("user", "fault"),)), timeout_s=20)
    assert isinstance(fault, ChatFault)
    assert (str(fault), fault.cause, fault.retry_after_s, fault.is_final) == ("not now", "rate_limited", 4.0, False)
    started = time.monotonic()
    (late,) = ask(model, chat(messages=(Message("user", "hang"),)), timeout_s=0.3)
    assert isinstance(late, ChatFault) and (late.cause, late.is_final) == ("timeout", False)
    assert 0.4 <= time.monotonic() - started < 2
    ray.kill(engine)
