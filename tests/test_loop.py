"""The loop on fakes that behave: a one-token policy that is sampled, graded, annotated, taught, trained and synced."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from trace_rl import loop
from trace_rl.absent import AbsentAnnotator, AbsentTeacher
from trace_rl.batch import AnnotatedRollout, GradedRollout, Prompt, Rollout, Span, TeacherRows, TokenStatistics
from trace_rl.config.run import RunConfig
from trace_rl.errors import PreemptedError, TrainingError
from trace_rl.flops import TeacherCost, TransformerShape
from trace_rl.ledger import Record, audit
from trace_rl.loop import Roles, evaluate, train
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import Decoding

VOCAB = 3
CORRECT = 1


class CharTokenizer:
    def apply_chat_template(self, conversation, **kwargs):
        return [ord(character) for character in conversation[-1]["content"]]


class Prompts:
    """Endless prompts "train/0", "train/1", ...; held-out ones apart."""

    def __init__(self):
        self.index = 0

    def take(self, count):
        first, self.index = self.index, self.index + count
        return [Prompt(f"train/{i}", f"q{i}", str(CORRECT)) for i in range(first, self.index)]

    def heldout(self, count):
        return [Prompt(f"heldout/{i}", f"h{i}", str(CORRECT)) for i in range(count)]

    def position(self):
        return {"index": self.index}

    def seek(self, position):
        self.index = position["index"]


class Engine:
    """Samples one token from softmax(weights); what it holds is only changed by a sync."""

    def __init__(self):
        self.weights, self.version, self.decodings, self.asked = np.zeros(VOCAB), -1, [], []

    def cancel(self, keys): ...

    def generate(self, requests, decoding):
        self.decodings.append(decoding)
        self.asked.append(sorted({request.prompt.prompt_id for request in requests}))
        temperature = decoding.temperature
        logprobs = self.weights / temperature - np.log(np.exp(self.weights / temperature).sum())
        for request in reversed(requests):  # an order of its own: identity is the key
            token = int(np.random.default_rng(request.seed).choice(VOCAB, p=np.exp(logprobs)))
            yield Rollout(
                request.prompt,
                request.sample,
                request.prompt_token_ids,
                (token,),
                np.array([logprobs[token]]),
                "stop",
                np.array([self.version]),
                str(token),
            )


class Grader:
    def grade(self, rollouts):
        for rollout in rollouts:
            yield GradedRollout(rollout, float(rollout.text == rollout.prompt.answer), "graded")

    def metrics(self):
        return {}


class Annotator:
    """Marks the only token of every correct rollout."""

    def __init__(self):
        self.asked = []

    def annotate(self, graded, span_classes):
        self.asked.append(span_classes)
        for item in graded:
            if "key" in span_classes and item.is_correct:
                yield AnnotatedRollout(item, (Span(0, 1, "key", "arith"),), "annotated")
            else:
                yield AnnotatedRollout(item, (), "not_requested")

    def metrics(self):
        return {"annotation/calls": 1.0}


class Teacher(AbsentTeacher):
    def __init__(self):
        self.refreshed, self.calls = [], defaultdict(list)
        """Steps in their order, and requests of each call by the step that its weights are of."""
        self.is_asked = threading.Event()

    @property
    def scored(self):
        return {step: sum(map(len, calls)) for step, calls in self.calls.items()}

    def refresh(self, step):
        self.refreshed.append(step)
        return True

    def score(self, requests):
        self.calls[self.refreshed[-1]].append(requests)
        self.is_asked.set()
        return [
            TeacherRows(
                request.key,
                request.view,
                request.positions,
                np.ones((len(request.positions), 2)),
                np.full(len(request.positions), -0.5),
                np.full(len(request.positions), 0.5),
            )
            for request in requests
        ]


class Learner:
    """Policy gradient on the logits: d logits += lr * sum_t w_t A_t (onehot - p)."""

    def __init__(self, learning_rate=2.0):
        self.weights, self.learning_rate, self.batches = np.zeros(VOCAB), learning_rate, []
        self.scored, self.measured, self.entropy = [], [], 1.0

    def logprobs(self):
        return self.weights - np.log(np.exp(self.weights).sum())

    def train_step(self, batch):
        self.batches.append(batch)
        p = np.exp(self.weights) / np.exp(self.weights).sum()
        gradient = np.zeros(VOCAB)
        for sequence in batch.sequences:
            gradient += sequence.pg_weight[0] * sequence.advantages[0] * (np.eye(VOCAB)[sequence.token_ids[0]] - p)
        self.weights = self.weights + self.learning_rate * gradient
        return {"loss/total": 0.0, "policy/entropy_nats": self.entropy}

    def score(self, batch):
        """Of each token its log-prob; scores rise with the key, so that the ranking is known."""
        self.scored.append(batch.step)
        return [
            TokenStatistics(
                sequence.key,
                int(sequence.route_index[0]),
                policy_entropy=np.array([float(number)]),
                divergence=np.array([float(number)]),
                policy_logprobs=self.logprobs()[[sequence.token_ids[0]]],
                teacher_logprobs=np.array([-0.5]),
            )
            for number, sequence in enumerate(batch.sequences)
            if len(sequence.route_index)
        ]

    def gradient_parts(self, batch):
        self.measured.append(batch.step)
        return {"policy_grad_norm": 2.0, "routed_grad_norm": 0.5, "cosine": 0.25}

    def save(self, path): ...

    def load(self, path): ...


class Sync:
    def __init__(self, learner, engine):
        self.learner, self.engine, self.versions = learner, engine, []

    def sync(self, version):
        self.engine.weights, self.engine.version = self.learner.weights.copy(), version
        self.versions.append(version)
        return {"sync/canary_gap_max_nats": 0.0}


class Unmeasured:
    def metrics(self):
        return {}


class Journal:
    def __init__(self):
        self.steps, self.evaluations, self.rollouts, self.figures = {}, {}, {}, {}

    @contextmanager
    def stage(self, name) -> Iterator[None]:
        yield

    def log_step(self, step, metrics):
        self.steps[step] = metrics

    def log_evaluation(self, step, metrics):
        self.evaluations[step] = metrics

    def log_rollouts(self, step, routed, batch, figures):
        assert [item.key for item in routed] == [sequence.key for sequence in batch.sequences]
        self.rollouts[step], self.figures[step] = routed, figures


class Checkpoints:
    def __init__(self, learner):
        self.learner, self.saved = learner, {}

    def save(self, step, position, pending):
        assert step not in self.saved, "a checkpoint is never written over"
        self.saved[step] = (self.learner.weights.copy(), position, pending)


ROUTE = {
    "selector": {"rollouts": "correct", "tokens": "key_spans"},
    "action": "fkl",
    "schedule": {"type": "hold_then_linear", "initial": 0.5, "hold_steps": 2, "decay_steps": 2},
}


A_PARAMETER = TransformerShape(num_layer_parameters=1, num_layers=0, attention_width=0, hidden=0, vocab=0)
"""Two operations a token."""


def configured(steps, routes=None, algorithm=None, sampling=None, **sections):
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "sampling": {"prompts_per_step": 4, "samples_per_prompt": 8, **(sampling or {})},
            "algorithm": {"routes": routes or {}, **(algorithm or {})},
            "evaluation": {"every": 4, "num_prompts": 32},
            "run": {"steps": steps, "checkpoint_every": 3},
            **sections,
        }
    )


def make_roles(config, annotator=None, teacher=None, sampler=None):
    learner, engine = Learner(), Engine()
    return Roles(
        prompts=Prompts(),
        encoder=PromptEncoder(CharTokenizer(), "", {}),
        generator=engine,
        sampler=sampler or engine,
        grader=Grader(),
        annotator=annotator or AbsentAnnotator(),
        teacher=teacher or AbsentTeacher(),
        teacher_cost=TeacherCost((A_PARAMETER,) if teacher else ()),
        learner=learner,
        policy_shape=A_PARAMETER,
        weight_sync=Sync(learner, engine),
        utilisation=Unmeasured(),
        journal=Journal(),
        checkpoints=Checkpoints(learner),
    )


def test_policy_gradient_run_learns_the_task():
    config = configured(steps=12)
    roles = make_roles(config)
    train(config, roles)
    before, after = (roles.journal.evaluations[step]["heldout/pass_at_1"] for step in (0, 12))
    assert before == pytest.approx(1 / VOCAB, abs=0.2)
    assert after > 0.8


def test_every_batch_is_written_by_weights_synced_before_it():
    config = configured(steps=5)
    roles = make_roles(config)
    train(config, roles)
    assert roles.weight_sync.versions == [0, 1, 2, 3, 4, 5]
    assert [batch.step for batch in roles.learner.batches] == [0, 1, 2, 3, 4]
    for step, routed in roles.journal.rollouts.items():
        assert {version for item in routed for version in item.member.rollout.token_versions} == {step}


def test_evaluations_and_checkpoints_come_on_time_and_at_the_end():
    config = configured(steps=7)
    roles = make_roles(config)
    train(config, roles)
    assert list(roles.journal.evaluations) == [0, 4, 7]
    assert list(roles.checkpoints.saved) == [3, 6, 7]
    assert roles.checkpoints.saved[3][1] == {"index": 12}
    assert list(roles.journal.steps) == list(range(7))


def test_annotator_and_teacher_are_asked_only_while_the_schedule_is_above_zero():
    config = configured(steps=6, routes={"key": ROUTE})
    annotator, teacher = Annotator(), Teacher()
    roles = make_roles(config, annotator, teacher)
    train(config, roles)
    # lambda: 0.5 0.5 0.5 0.25 0 0
    assert annotator.asked == [frozenset({"key"})] * 4 + [frozenset()] * 2
    assert teacher.refreshed == [0, 1, 2, 3]
    assert list(teacher.scored) == [0, 1, 2, 3]
    assert [roles.journal.steps[step]["route/key/lambda"] for step in range(6)] == [0.5, 0.5, 0.5, 0.25, 0.0, 0.0]
    assert [roles.journal.steps[step]["route/key/policy_weight"] for step in range(6)] == [0, 0, 0, 0.5, 1, 1]


def test_what_the_teacher_was_spared_is_told_while_the_method_has_one():
    roles = make_roles(configured(steps=6, routes={"key": ROUTE}), Annotator(), teacher := Teacher())
    train(configured(steps=6, routes={"key": ROUTE}), roles)
    first = roles.journal.steps[0]
    # 32 rollouts of a token; the prompts q0 to q3 are two more, which stand in where none was made for the teacher
    sent = first["teacher/forward_tokens"]
    assert first["teacher/flops_saved_frac"] == pytest.approx(1 - sent / (sent + 3 * (32 - teacher.scored[0])))
    assert first["teacher/state_bytes"] == teacher.scored[0] * 2 * 8
    # lambda is 0 in the last two steps
    names = ("flops_saved_frac", "forward_tokens", "state_bytes")
    assert [[roles.journal.steps[step][f"teacher/{name}"] for name in names] for step in (4, 5)] == [[1, 0, 0]] * 2


def test_without_a_teacher_nothing_is_told_of_one():
    roles = make_roles(configured(steps=1))
    train(configured(steps=1), roles)
    assert not any(name.startswith("teacher/") for name in roles.journal.steps[0])


def test_a_resumed_run_reaches_the_weights_of_an_uninterrupted_one():
    config = configured(steps=8)
    whole = make_roles(config)
    train(config, whole)

    first = make_roles(config)
    train(configured(steps=3), first)
    weights, position, pending = first.checkpoints.saved[3]
    assert pending == []
    second = make_roles(config)
    second.learner.weights = weights
    second.prompts.seek(position)
    train(config, second, start_step=3)

    np.testing.assert_array_equal(second.learner.weights, whole.learner.weights)
    assert 0 not in second.journal.evaluations  # the base was measured by the first run


class Account:
    """A ledger that keeps its records."""

    def __init__(self):
        self.records = []

    def note(self, fate, step, prompts):
        if prompts:
            self.records.append(Record(len(self.records), fate, step, prompts))

    def mark(self, mark, step):
        self.records.append(Record(len(self.records), mark, step))

    def settle(self): ...


def test_every_prompt_of_a_run_is_accounted_for():
    config = configured(steps=5)
    roles = replace(make_roles(config), ledger=Account())
    train(config, roles)
    account = audit(roles.ledger.records)
    assert account.is_exact and (account.trained, account.dropped, account.steps) == (20, 0, 5)
    fates = Counter(record.event for record in roles.ledger.records for _ in record.prompts)
    assert fates == dict.fromkeys(("issued", "finished", "graded", "annotated", "trained"), 20)


class ToldToEnd:
    """Says yes once a step has begun to wait for rollouts, or once it is over."""

    def __init__(self, journal, step, is_over):
        self.journal, self.step, self.is_over = journal, step, is_over

    def __call__(self):
        return len(self.journal.steps) == self.step + self.is_over


class Slow(Engine):
    def generate(self, requests, decoding):
        time.sleep(0.05)  # or all rollouts would be there before anyone has to wait for them
        yield from super().generate(requests, decoding)


@pytest.mark.parametrize("is_over", [False, True])
def test_a_run_that_is_told_to_end_leaves_a_checkpoint_that_reaches_the_same_weights(is_over):
    config = configured(steps=7, evaluation={"every": 4, "num_prompts": 8})
    whole = make_roles(config)
    train(config, whole)
    account, engine = Account(), Slow()
    told = replace(make_roles(config, sampler=engine), ledger=account, generator=engine)
    told = replace(told, weight_sync=Sync(told.learner, engine))
    with pytest.raises(PreemptedError, match="was told to end"):
        train(config, told, is_told_to_end=ToldToEnd(told.journal, 3, is_over))
    done = 3 + is_over
    weights, position, pending = told.checkpoints.saved[done]
    assert max(told.checkpoints.saved) == done and done not in told.journal.evaluations
    resumed = replace(make_roles(config), ledger=account)
    resumed.learner.weights[:] = weights
    resumed.prompts.seek(position)
    account.mark("resumed", done)
    train(config, resumed, done, pending=pending)
    np.testing.assert_array_equal(resumed.learner.weights, whole.learner.weights)
    assert resumed.journal.evaluations[7] == whole.journal.evaluations[7]
    assert resumed.journal.evaluations[4] == whole.journal.evaluations[4], "a skipped evaluation is made up for"
    assert audit(account.records).is_exact and audit(account.records).trained == 28


@pytest.mark.parametrize("checkpoint_every", [3, 4])
def test_a_run_that_is_told_to_end_while_it_evaluates_writes_one_checkpoint_of_that_step(checkpoint_every):
    run = {"steps": 7, "checkpoint_every": checkpoint_every}
    config, engine = configured(steps=7, evaluation={"every": 4, "num_prompts": 8}, run=run), Slow()
    roles = make_roles(config, sampler=engine)
    roles = replace(roles, generator=engine, weight_sync=Sync(roles.learner, engine))
    with pytest.raises(PreemptedError, match="while step 4 waited"):
        train(config, roles, is_told_to_end=lambda: 4 in roles.journal.evaluations)
    assert max(roles.checkpoints.saved) == 4


def test_a_run_that_is_told_to_end_before_its_first_step_is_over_has_nothing_to_keep():
    config, engine = configured(steps=3), Slow()
    roles = make_roles(config, sampler=engine)
    roles = replace(roles, generator=engine, weight_sync=Sync(roles.learner, engine))
    with pytest.raises(PreemptedError):
        train(config, roles, is_told_to_end=lambda: True)
    assert not roles.checkpoints.saved


def test_absent_roles_refuse_real_work():
    config = configured(steps=1, routes={"key": ROUTE})
    with pytest.raises(ValueError, match="no annotator"):
        train(config, make_roles(config))


ALL = {"selector": {"tokens": "all"}, "schedule": {"type": "constant", "value": 1.0}, "on_routed": "keep"}
NO_POLICY_GRADIENT = {"advantage": "none", "policy_gradient": "none"}


def test_a_route_that_needs_no_labels_asks_the_teacher_and_no_annotator():
    config = configured(steps=2, routes={"all": {**ALL, "action": "fkl"}}, teacher={"context": "none"})
    teacher = Teacher()
    roles = make_roles(config, teacher=teacher)
    train(config, roles)
    assert teacher.refreshed == [0, 1]
    assert teacher.scored == {0: 32, 1: 32}


class OneLate(Engine):
    """Holds the last completion back until the teacher was asked for others."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def generate(self, requests, decoding):
        *others, last = super().generate(requests, decoding)
        yield from others
        assert decoding.goes_first or self.teacher.is_asked.wait(60), "nobody asked the teacher while one was late"
        yield last


def test_the_teacher_scores_complete_prompts_while_others_are_sampled():
    alone = {"context": "none", "max_tokens_per_batch": 1}
    config = configured(steps=1, routes={"all": {**ALL, "action": "fkl"}}, teacher=alone)
    teacher = Teacher()
    roles = make_roles(config, teacher=teacher, sampler=(engine := OneLate(teacher)))
    roles.weight_sync.engine = engine
    train(config, roles)
    calls = [{request.key.prompt_id for request in call} for call in teacher.calls[0]]
    assert sorted(map(len, calls)) == [1, 1, 1, 1]  # a prompt each
    assert [len(call) for call in teacher.calls[0]] == [8] * 4
    assert calls[-1] == {"train/0"}


def test_a_route_that_reads_no_teacher_never_asks_it():
    config = configured(steps=2, routes={"key": {**ROUTE, "action": "none"}})
    annotator, teacher = Annotator(), Teacher()
    train(config, make_roles(config, annotator, teacher))
    assert (teacher.refreshed, teacher.scored) == ([], {})
    assert annotator.asked == [frozenset({"key"})] * 2


def test_training_samples_come_from_the_sampler_and_evaluations_from_the_policy_untruncated():
    config = configured(
        steps=2,
        routes={"all": {**ALL, "action": "nll"}},
        algorithm=NO_POLICY_GRADIENT,
        sampling={"temperature": 1.1, "top_p": 0.9, "top_k": 5},
    )
    sampler = Engine()
    roles = make_roles(config, sampler=sampler)
    sampler.version = -1  # nobody syncs it: its completions are not the policy's
    train(config, roles)
    assert sampler.decodings == [Decoding(1.1, 0.9, 5)] * 2
    assert roles.generator.decodings == [Decoding(1.0, goes_first=True)] * 2
    assert all(name.startswith("train/") for names in sampler.asked for name in names)
    assert all(name.startswith("heldout/") for names in roles.generator.asked for name in names)


def test_held_out_prompts_are_rendered_with_the_evaluations_arguments():
    class Thinking(CharTokenizer):
        def apply_chat_template(self, conversation, *, thinking, **kwargs):
            return [*super().apply_chat_template(conversation), int(thinking)]

    class Recording(Engine):
        def generate(self, requests, decoding):
            self.last_ids = {request.prompt_token_ids[-1] for request in requests}
            yield from super().generate(requests, decoding)

    config = configured(steps=1, evaluation={"every": 1, "chat_template_kwargs": {"thinking": True}})
    encoder = PromptEncoder(Thinking(), "", {"thinking": False})
    roles = replace(make_roles(config), encoder=encoder, generator=(engine := Recording()))
    evaluate(config, roles)
    assert engine.last_ids == {1}
    assert encoder.student_ids(Prompt("p", "q", "a"))[-1] == 0


class Sure(Engine):
    """Answers every second prompt rightly each time, and samples the others."""

    def generate(self, requests, decoding):
        for rollout in super().generate(requests, decoding):
            if int(rollout.prompt.prompt_id.split("/")[1]) % 2:
                rollout = replace(rollout, token_ids=(CORRECT,), text=str(CORRECT))
            yield rollout


def test_prompts_without_a_signal_are_refilled_by_rounds():
    config = configured(steps=1, algorithm={"dynamic_sampling": {"max_rounds": 3}}, evaluation={"every": 0})
    engine = Sure()
    roles = make_roles(config, sampler=engine)
    engine.version = 0
    train(config, roles)
    # 4 prompts a round, half of them without a signal: 2 + 2 are found in two rounds
    assert [len(names) for names in engine.asked] == [4, 4]
    trained = {item.key.prompt_id for item in roles.journal.rollouts[0]}
    assert trained == {"train/0", "train/2", "train/4", "train/6"}
    # the metrics tell of everything that was sampled
    assert roles.journal.steps[0]["reward/zero_variance_groups_frac"] == 0.5
    assert roles.journal.steps[0]["sampling/trained_frac"] == 0.5
    assert roles.prompts.position() == {"index": 8}


def test_of_too_many_prompts_with_a_signal_the_first_of_the_source_are_kept():
    class SureAtFirst(Engine):
        def generate(self, requests, decoding):
            for rollout in super().generate(requests, decoding):
                is_sure = int(rollout.prompt.prompt_id.split("/")[1]) < 9
                yield replace(rollout, token_ids=(CORRECT,), text=str(CORRECT)) if is_sure else rollout

    sampling = {"prompts_per_step": 3, "samples_per_prompt": 16}
    dynamic = {"dynamic_sampling": {"max_rounds": 3}}
    config = configured(steps=1, algorithm=dynamic, evaluation={"every": 0}, sampling=sampling)
    engine = SureAtFirst()
    roles = make_roles(config, sampler=engine)
    engine.version = 0
    roles.prompts.index = 7
    train(config, roles)
    # of 7 8 9 only 9 has a signal, and so have 10 11 12: one too many, and not 9, although as text it comes last
    assert [len(names) for names in engine.asked] == [3, 3]
    assert {item.key.prompt_id for item in roles.journal.rollouts[0]} == {"train/9", "train/10", "train/11"}


class AlwaysRight(Engine):
    def generate(self, requests, decoding):
        for rollout in super().generate(requests, decoding):
            yield replace(rollout, token_ids=(CORRECT,), text=str(CORRECT))


def test_refilling_ends_and_a_step_is_never_empty():
    config = configured(steps=1, algorithm={"dynamic_sampling": {"max_rounds": 3}}, evaluation={"every": 0})
    engine = AlwaysRight()
    roles = make_roles(config, sampler=engine)
    engine.version = 0
    train(config, roles)
    assert len(engine.asked) == 3
    assert {item.key.prompt_id for item in roles.journal.rollouts[0]} == {f"train/{i}" for i in range(8, 12)}


def test_nothing_is_refilled_while_a_route_is_active():
    dynamic = {"dynamic_sampling": {"max_rounds": 3}}
    config = configured(steps=6, routes={"key": ROUTE}, algorithm=dynamic, evaluation={"every": 0})
    roles = make_roles(config, Annotator(), Teacher(), sampler=(engine := AlwaysRight()))
    roles.weight_sync.engine = engine
    train(config, roles)
    # lambda: 0.5 0.5 0.5 0.25, then 0
    assert len(engine.asked) == 4 + 2 * 3


def test_ranked_tokens_are_the_highest_scores_of_the_batch():
    top = {"type": "top", "frac": 0.25, "score": "policy_entropy"}
    route = {**ALL, "selector": {"tokens": top}, "action": "rkl", "normalisation": "route-mean"}
    config = configured(steps=1, routes={"top": route}, algorithm=NO_POLICY_GRADIENT, teacher={"context": "none"})
    roles = make_roles(config, teacher=Teacher())
    train(config, roles)
    assert roles.learner.scored == [0]
    (batch,) = roles.learner.batches
    # a quarter of 32 tokens; scores rise with the key, but for those above the 98th percentile, which are equal
    kept = [number for number, sequence in enumerate(batch.sequences) if len(sequence.route_positions)]
    assert kept == list(range(24, 32))
    weights = np.concatenate([sequence.route_weight for sequence in batch.sequences])
    assert weights == pytest.approx([1 / 8] * 8)


def test_steps_are_measured_every_few_and_the_exposure_adds_up():
    config = configured(
        steps=5,
        routes={"all": {**ALL, "action": "fkl"}},
        teacher={"context": "none"},
        logging={"diagnostics_every": 2},
    )
    roles = make_roles(config, teacher=Teacher())
    train(config, roles)
    assert roles.learner.measured == [0, 2, 4]
    assert roles.learner.scored == [0, 0, 2, 2, 4, 4]
    measured = [step for step, metrics in roles.journal.steps.items() if "diagnostics/cosine" in metrics]
    assert measured == [0, 2, 4]
    assert "diagnostics/all/one_step_lift_nats" in roles.journal.steps[0]
    exposure = [roles.journal.steps[step]["exposure/routed_grad_norm_sum"] for step in measured]
    assert exposure == [1.0, 2.0, 3.0]  # 2 steps x 0.5 each time
    assert [roles.journal.steps[step]["exposure/lambda_sq_sum"] for step in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]


class Inspecting(Learner):
    """Tells of each sequence how many batches it had been trained on."""

    def inspect(self, batch):
        return [(sequence.key, len(self.batches)) for sequence in batch.sequences]


def test_figures_are_of_the_stored_rollouts_before_they_are_trained_on():
    logging = {"rollouts_every": 2, "rollouts_per_step": 3, "token_figures": "measured"}
    config = configured(steps=4, logging=logging)
    learner = Inspecting()
    roles = make_roles(config)
    roles = replace(roles, learner=learner, weight_sync=Sync(learner, roles.generator))
    train(config, roles)
    for step in range(4):
        stored = [] if step % 2 else [(item.key, step) for item in roles.journal.rollouts[step][:3]]
        assert list(roles.journal.figures[step]) == stored


def test_nothing_is_measured_where_known_figures_will_do():
    config = configured(steps=1, logging={"rollouts_every": 1})
    roles = make_roles(config)
    train(config, roles)  # this learner cannot be inspected
    assert list(roles.journal.figures[0]) == []


def test_a_step_of_masked_completions_is_skipped_and_the_run_goes_on():
    class Endless(Engine):
        def generate(self, requests, decoding):
            for rollout in super().generate(requests, decoding):
                yield replace(rollout, finish_reason="length")

    config = configured(steps=2, algorithm={"overlong": {"mask": True}}, evaluation={"every": 0})
    roles = make_roles(config, sampler=(engine := Endless()))
    roles.weight_sync.engine = engine
    train(config, roles)
    assert roles.learner.batches == []
    assert [roles.journal.steps[step]["learner/skipped_steps"] for step in (0, 1)] == [1.0, 1.0]
    assert roles.weight_sync.versions == [0, 1, 2]


def collapsing(action):
    """A run whose entropy doubles, whose accuracy falls, and whose responses cannot become shorter than a token."""
    watch = {"action": action, "window": 1, "length_drop_frac": 0.3, "heldout_drop": 0.01, "entropy_rise_frac": 0.1}
    return configured(steps=8, watch=watch, evaluation={"every": 2, "num_prompts": 64})


class Collapsing(Learner):
    """Forgets what it has learned after the third step."""

    def train_step(self, batch):
        metrics = super().train_step(batch)
        if batch.step >= 3:
            self.weights, self.entropy = np.array([4.0, -4.0, 0.0]), 3.0
        return metrics


def collapse(config, monkeypatch, history=(), start_step=0):
    roles = make_roles(config)
    learner = Collapsing()
    roles = replace(roles, learner=learner, checkpoints=Checkpoints(learner))
    roles.weight_sync.learner = learner
    # every response has one token here, so the third symptom is told by the metric alone
    plain = loop.rollout_metrics
    lengths = iter(range(20, 0, -2))
    monkeypatch.setattr(
        loop, "rollout_metrics", lambda *seen: {**plain(*seen), "response/length_mean_tokens": float(next(lengths))}
    )
    train(config, roles, start_step, history)
    return roles


def test_a_collapse_is_told_and_the_run_goes_on(monkeypatch, caplog):
    roles = collapse(collapsing("warn"), monkeypatch)
    assert "all three symptoms of a collapse" in caplog.text
    assert len(roles.journal.steps) == 8
    assert roles.journal.steps[7]["collapse/entropy_ratio"] > 1.1


def test_a_collapse_can_stop_the_run_with_a_checkpoint(monkeypatch, caplog):
    with pytest.raises(TrainingError, match=r"all three symptoms.*was stopped \(watch\.action\)"):
        collapse(collapsing("stop"), monkeypatch)


def test_a_watch_that_is_off_says_nothing(monkeypatch, caplog):
    collapse(collapsing("off"), monkeypatch)
    assert "collapse" not in caplog.text


def test_a_resumed_run_remembers_its_start(monkeypatch, caplog):
    start = {"policy/entropy_nats": 0.5, "response/length_mean_tokens": 100.0}
    history = [{"step": 0, "heldout/pass_at_1": 1.0}, {"step": 0, **start}]
    with pytest.raises(TrainingError, match=r"100\.0 ->"):
        collapse(collapsing("stop"), monkeypatch, history, start_step=1)


def test_a_further_set_is_evaluated_at_the_same_steps_under_its_own_name():
    config = configured(steps=5)
    roles = make_roles(config)
    plain = make_roles(config)
    train(config, plain)
    train(config, replace(roles, evaluation_sets={"harder": roles.prompts.heldout(3)}))
    assert list(roles.journal.evaluations) == [0, 4, 5]
    for step, metrics in roles.journal.evaluations.items():
        assert {name: metrics[name] for name in plain.journal.evaluations[step]} == plain.journal.evaluations[step]
        assert metrics["eval/harder/samples"] == 3
        assert 0 <= metrics["eval/harder/pass_at_1"] <= 1
        assert metrics["eval/harder/length_mean_tokens"] == 1


def test_a_run_of_no_steps_evaluates_the_model_as_it_is():
    config = configured(steps=0)
    roles = make_roles(config)
    before = roles.learner.weights.copy()
    train(config, roles)
    assert list(roles.journal.evaluations) == [0]
    assert roles.journal.steps == {}
    assert (roles.learner.weights == before).all()
