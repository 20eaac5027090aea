"""The loop on fakes that behave: a one-token policy that is sampled, graded, annotated, taught, trained and synced."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from trace_rl.absent import AbsentAnnotator, AbsentTeacher
from trace_rl.batch import AnnotatedRollout, GradedRollout, Prompt, Rollout, Span, TeacherRows
from trace_rl.config.run import RunConfig
from trace_rl.loop import Roles, train
from trace_rl.prompts import PromptEncoder

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
        self.weights, self.version = np.zeros(VOCAB), -1

    def generate(self, requests, temperature):
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
                self.version,
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
        self.refreshed, self.scored = [], []

    def refresh(self, step):
        self.refreshed.append(step)
        return True

    def score(self, requests):
        self.scored.append(len(requests))
        return [TeacherRows(request.key, np.ones((len(request.positions), 2))) for request in requests]


class Learner:
    """Policy gradient on the logits: d logits += lr * sum_t w_t A_t (onehot - p)."""

    def __init__(self, learning_rate=2.0):
        self.weights, self.learning_rate, self.batches = np.zeros(VOCAB), learning_rate, []

    def train_step(self, batch):
        self.batches.append(batch)
        p = np.exp(self.weights) / np.exp(self.weights).sum()
        gradient = np.zeros(VOCAB)
        for sequence in batch.sequences:
            gradient += sequence.pg_weight[0] * sequence.advantage * (np.eye(VOCAB)[sequence.token_ids[0]] - p)
        self.weights = self.weights + self.learning_rate * gradient
        return {"loss/total": 0.0}

    def save(self, path): ...

    def load(self, path): ...


class Sync:
    def __init__(self, learner, engine):
        self.learner, self.engine, self.versions = learner, engine, []

    def sync(self, version):
        self.engine.weights, self.engine.version = self.learner.weights.copy(), version
        self.versions.append(version)
        return {"sync/canary_gap_max_nats": 0.0}


class Journal:
    def __init__(self):
        self.steps, self.evaluations, self.rollouts = {}, {}, {}

    @contextmanager
    def stage(self, name) -> Iterator[None]:
        yield

    def log_step(self, step, metrics):
        self.steps[step] = metrics

    def log_evaluation(self, step, metrics):
        self.evaluations[step] = metrics

    def log_rollouts(self, step, routed):
        self.rollouts[step] = routed


class Checkpoints:
    def __init__(self, learner):
        self.learner, self.saved = learner, {}

    def save(self, step, position):
        self.saved[step] = (self.learner.weights.copy(), position)


ROUTE = {
    "selector": {"rollouts": "correct", "tokens": "key_spans"},
    "action": "fkl",
    "schedule": {"type": "hold_then_linear", "initial": 0.5, "hold_steps": 2, "decay_steps": 2},
}


def configured(steps, routes=None, **run):
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "sampling": {"prompts_per_step": 4, "samples_per_prompt": 8},
            "algorithm": {"routes": routes or {}},
            "evaluation": {"every": 4, "num_prompts": 32},
            "run": {"steps": steps, "checkpoint_every": 3, **run},
        }
    )


def make_roles(config, annotator=None, teacher=None):
    learner, engine = Learner(), Engine()
    return Roles(
        prompts=Prompts(),
        encoder=PromptEncoder(CharTokenizer(), "", {}, config.teacher),
        generator=engine,
        grader=Grader(),
        annotator=annotator or AbsentAnnotator(),
        teacher=teacher or AbsentTeacher(),
        learner=learner,
        weight_sync=Sync(learner, engine),
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
    assert [batch.policy_version for batch in roles.learner.batches] == [0, 1, 2, 3, 4]
    for step, routed in roles.journal.rollouts.items():
        assert {item.annotated.graded.rollout.policy_version for item in routed} == {step}


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
    assert all(count > 0 for count in teacher.scored[:4])
    assert teacher.scored[4:] == [0, 0]
    assert [roles.journal.steps[step]["route/key/lambda"] for step in range(6)] == [0.5, 0.5, 0.5, 0.25, 0.0, 0.0]
    assert [roles.journal.steps[step]["route/key/policy_weight"] for step in range(6)] == [0, 0, 0, 0.5, 1, 1]


def test_a_resumed_run_reaches_the_weights_of_an_uninterrupted_one():
    config = configured(steps=8)
    whole = make_roles(config)
    train(config, whole)

    first = make_roles(config)
    train(configured(steps=3), first)
    weights, position = first.checkpoints.saved[3]
    second = make_roles(config)
    second.learner.weights = weights
    second.prompts.seek(position)
    train(config, second, start_step=3)

    np.testing.assert_array_equal(second.learner.weights, whole.learner.weights)
    assert 0 not in second.journal.evaluations  # the base was measured by the first run


def test_absent_roles_refuse_real_work():
    config = configured(steps=1, routes={"key": ROUTE})
    with pytest.raises(ValueError, match="no annotator"):
        train(config, make_roles(config))
