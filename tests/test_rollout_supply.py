"""Which groups a step gets, on stages that give out completions only when the test says so."""

import queue
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from trace_rl.absent import AbsentLedger
from trace_rl.batch import AnnotatedRollout, GradedRollout, Prompt, Rollout
from trace_rl.config.run import RunConfig
from trace_rl.data import RowSource
from trace_rl.errors import TrainingError, WorkerError
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import Drawn
from trace_rl.rollout_supply import RolloutSupply

WAIT_S = 5


class CharTokenizer:
    def apply_chat_template(self, conversation, **kwargs):
        return [ord(character) for character in conversation[-1]["content"]]


class Grader:
    def grade(self, rollouts):
        for rollout in rollouts:
            yield GradedRollout(rollout, float(rollout.text == "right"), "graded")


class Annotator:
    def annotate(self, graded, span_classes):
        for item in graded:
            yield AnnotatedRollout(item, (), "not_requested")


class Sampler:
    """Finishes a completion when the test lets it, or at once where it is told so; `version` is that of the weights.

    One that is deaf finishes also what was given up, as a grader does that has a completion already.
    """

    def __init__(self, at_once=False, deaf=False):
        self.version, self.at_once, self.deaf = 0, at_once, deaf
        self.calls, self.cancelled = [], []
        self.open = {}

    def generate(self, requests, decoding):
        arrived = queue.SimpleQueue()
        self.calls.append([request.prompt.prompt_id for request in requests if request.sample == 0])
        for request in requests:
            self.open[request.prompt.prompt_id, request.sample] = (request, arrived, self.version)
            if self.at_once:
                self.finish(request.prompt.prompt_id, request.sample)
        return (item for item in map(lambda _: arrived.get(timeout=WAIT_S), requests) if item is not None)

    def finish(self, prompt_id, sample, text="right"):
        request, arrived, version = self.open.pop((prompt_id, sample))
        version = np.array([version])
        arrived.put(Rollout(request.prompt, sample, request.prompt_token_ids, (1,), np.zeros(1), "stop", version, text))

    def finish_group(self, prompt_id, texts=("right", "wrong")):
        for sample, text in enumerate(texts):
            self.finish(prompt_id, sample, text)

    def cancel(self, keys):
        self.cancelled += [tuple(key) for key in keys]
        for key in keys:
            if tuple(key) in self.open and not self.deaf:
                _, arrived, _ = self.open.pop(tuple(key))
                arrived.put(None)


@dataclass
class Stages:
    sampler: Sampler
    prompts: RowSource
    encoder: PromptEncoder = field(default_factory=lambda: PromptEncoder(CharTokenizer(), "", {}))
    grader: Grader = field(default_factory=Grader)
    annotator: Annotator = field(default_factory=Annotator)
    ledger: AbsentLedger = field(default_factory=AbsentLedger)


class Numbered:
    """p0, p1, p2, ..."""

    def __init__(self):
        self.index = 0

    def take(self, count):
        first, self.index = self.index, self.index + count
        return [Prompt(f"p{number}", "q", "a") for number in range(first, self.index)]

    def position(self):
        return {"index": self.index}

    def seek(self, position):
        self.index = position["index"]


def configured(steps=10, prompts=2, dynamic=1, **scheduling):
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "sampling": {"prompts_per_step": prompts, "samples_per_prompt": 2},
            "algorithm": {"dynamic_sampling": {"max_rounds": dynamic}},
            "scheduling": scheduling,
            "run": {"steps": steps},
        }
    )


def supply(sampler, source=None, pending=(), **config):
    stages = Stages(sampler, source or Numbered())
    return RolloutSupply(configured(**config), stages, pending)


class Taking:
    """A `take` in a thread of its own, which may have to wait."""

    def __init__(self, supply, step, on_group=lambda place, group: None):
        self.result = queue.SimpleQueue()
        self.thread = threading.Thread(target=lambda: self.result.put(supply.take(step, on_group)), daemon=True)
        self.thread.start()

    def is_waiting(self):
        self.thread.join(0.3)
        return self.thread.is_alive()

    def prompts(self):
        return prompts_of(self.result.get(timeout=WAIT_S))


def prompts_of(taken):
    return [item.graded.rollout.prompt.prompt_id for item in taken.annotated if item.graded.rollout.sample == 0]


def at_once(sampler, supply, step, *ready):
    """What the step takes once these groups are complete."""
    taking = Taking(supply, step)
    assert taking.is_waiting()
    for name in ready:
        sampler.finish_group(name)
    return taking.prompts()


def test_a_synchronous_step_admits_its_own_prompts_and_takes_all_of_them():
    sampler = Sampler(at_once=True)
    synchronous = supply(sampler, prompts=3, steps=2)
    assert prompts_of(synchronous.take(0)) == ["p0", "p1", "p2"]
    assert synchronous.pending() == []
    assert sampler.calls == [["p0", "p1", "p2"]]
    assert prompts_of(synchronous.take(1)) == ["p3", "p4", "p5"]
    assert synchronous.metrics() == {}


def test_a_synchronous_step_waits_for_its_last_completion():
    sampler = Sampler()
    taking = Taking(supply(sampler), 0)
    assert taking.is_waiting()
    sampler.finish_group("p0")
    sampler.finish("p1", 0)
    assert taking.is_waiting()
    sampler.finish("p1", 1)
    assert taking.prompts() == ["p0", "p1"]


class Places:
    """Notes which place each prompt was told of at."""

    def __init__(self):
        self.of = {}

    def __call__(self, place, group):
        assert len(group) == 2
        self.of[group[0].graded.rollout.prompt.prompt_id] = place


@pytest.mark.parametrize("order", [("p0", "p1", "p2"), ("p2", "p0", "p1"), ("p1", "p2", "p0")])
def test_places_are_those_of_drawing_whatever_is_complete_first(order):
    sampler = Sampler()
    synchronous = supply(sampler, prompts=3)
    places = Places()
    taking = Taking(synchronous, 0, places)
    assert taking.is_waiting() and places.of == {}
    for name in order:
        sampler.finish_group(name)
    assert taking.prompts() == ["p0", "p1", "p2"]
    assert places.of == {"p0": 0, "p1": 1, "p2": 2}
    places = Places()
    sampler.at_once = True
    assert prompts_of(synchronous.take(1, places)) == ["p3", "p4", "p5"]
    assert places.of == {"p3": 0, "p4": 1, "p5": 2}


def test_prompts_that_a_run_left_behind_have_the_places_that_they_had():
    drawn = [Drawn({"index": 0}, 3, index) for index in range(3)]
    source = Numbered()
    source.seek({"index": 3})
    places = Places()
    prompts_of(supply(Sampler(at_once=True), source, drawn, prompts=3).take(0, places))
    assert places.of == {"p0": 0, "p1": 1, "p2": 2}


def test_groups_that_may_be_replaced_are_told_to_nobody():
    sampler = Sampler(at_once=True)
    places = Places()
    supply(sampler, prompts=2, dynamic=2).take(0, places)
    assert places.of == {}


def test_one_step_off_samples_the_next_step_while_this_one_is_learnt():
    sampler = Sampler()
    ahead = supply(sampler, max_staleness=1)
    assert at_once(sampler, ahead, 0, "p0", "p1") == ["p0", "p1"]
    # 2 x 2 prompts were admitted, of which two go on
    assert sampler.calls == [["p0", "p1", "p2", "p3"]]
    assert sorted({name for name, _ in sampler.open}) == ["p2", "p3"]
    assert ahead.metrics() == {
        "queue/in_flight_groups": 2.0,
        "queue/ready_groups": 0.0,
        "queue/dropped_groups": 0.0,
    }
    assert at_once(sampler, ahead, 1, "p2", "p3") == ["p2", "p3"]
    assert sorted({name for name, _ in sampler.open}) == ["p4", "p5"]


def test_a_step_takes_the_oldest_complete_groups_and_leaves_slow_ones_that_are_not_due():
    sampler = Sampler()
    ahead = supply(sampler, max_staleness=2)
    # p0 is slow; it was admitted at version 0 and is due at step 2
    assert at_once(sampler, ahead, 0, "p2", "p1", "p3") == ["p1", "p2"]
    assert at_once(sampler, ahead, 1, "p4") == ["p3", "p4"]
    taking = Taking(ahead, 2)
    for name in ("p5", "p6"):
        sampler.finish_group(name)
    assert taking.is_waiting()  # for p0, though two others are complete
    sampler.finish_group("p0")
    assert taking.prompts() == ["p0", "p5"]


def test_what_would_be_too_old_is_given_up_where_the_run_does_not_wait():
    sampler = Sampler()
    ahead = supply(sampler, max_staleness=1, late="drop")
    assert at_once(sampler, ahead, 0, "p1", "p2") == ["p1", "p2"]
    sampler.finish("p0", 0)
    # p0 and p3 were admitted at version 0; p4 and p5 at version 1
    assert at_once(sampler, ahead, 1, "p4", "p5") == ["p4", "p5"]
    assert sampler.cancelled == [("p0", 1), ("p3", 0), ("p3", 1)]
    assert ahead.metrics()["queue/dropped_groups"] == 2
    taking = Taking(ahead, 2)
    assert taking.is_waiting()
    # their places are taken by p6 and p7, which come with p8 and p9 of this step
    assert sorted({name for name, _ in sampler.open}) == ["p6", "p7", "p8", "p9"]
    sampler.finish_group("p6")
    sampler.finish_group("p9")
    assert taking.prompts() == ["p6", "p9"]


def test_completions_of_a_group_that_was_given_up_are_not_taken_for_another_one():
    """Two rows. The one that was given up comes again at the next step, before its old completion does."""
    sampler = Sampler(deaf=True)
    source = RowSource([Prompt(name, "q", "a") for name in "ab"], [], seed=0)
    ahead = supply(sampler, source, prompts=1, late="drop", oversampling_frac=1)
    taking = Taking(ahead, 0)
    assert taking.is_waiting()
    first, second = sampler.calls[0]
    sampler.finish(second, 0)
    sampler.finish_group(first)
    assert taking.prompts() == [first]
    assert sampler.cancelled == [(second, 1)]
    old = sampler.open.pop((second, 1))
    sampler.version = 1
    taking = Taking(ahead, 1)
    assert taking.is_waiting()
    assert {name for name, _ in sampler.open} == {first, second}
    new, sampler.open[second, 1] = sampler.open[second, 1], old
    sampler.finish(second, 1)
    sampler.open[second, 1] = new
    sampler.finish(second, 0)
    assert taking.is_waiting()
    sampler.finish(second, 1)
    taken = taking.result.get(timeout=WAIT_S)
    assert [int(item.graded.rollout.token_versions[0]) for item in taken.annotated] == [1, 1]


def test_what_has_come_while_the_learner_worked_is_not_given_up():
    sampler = Sampler()
    ahead = supply(sampler, max_staleness=1, late="drop", oversampling_frac=1.0)
    assert at_once(sampler, ahead, 0, "p4", "p5") == ["p4", "p5"]
    for name in ("p0", "p1", "p2"):  # comes between the steps
        sampler.finish_group(name)
    assert prompts_of(ahead.take(1)) == ["p0", "p1"]
    assert sorted({name for name, _ in sampler.cancelled}) == ["p3"]
    assert ahead.metrics()["queue/dropped_groups"] == 2  # and p2, which is complete and one too many


def test_an_error_between_the_steps_is_raised_though_enough_is_ready():
    class Failing(Sampler):
        def generate(self, requests, decoding):
            yield from super().generate(requests, decoding)
            raise TrainingError("the engine has gone")

    sampler = Failing(at_once=True)
    ahead = supply(sampler, max_staleness=1)
    with pytest.raises(TrainingError, match="the engine has gone"):
        for step in range(3):
            ahead.take(step)
            for thread in threading.enumerate():
                if thread.name.startswith("rollouts"):
                    thread.join(WAIT_S)


def test_nothing_is_left_running_at_the_end():
    before = set(threading.enumerate())
    sampler = Sampler()
    ahead = supply(sampler, late="drop", max_staleness=1, steps=9)
    assert at_once(sampler, ahead, 0, "p0", "p1") == ["p0", "p1"]
    ahead.close(3)
    assert not sampler.open
    assert not [thread for thread in threading.enumerate() if thread not in before and "rollouts" in thread.name]


def test_oversampling_cuts_the_slowest_and_samples_so_many_more():
    sampler = Sampler()
    ahead = supply(sampler, prompts=2, late="drop", oversampling_frac=0.5)
    assert at_once(sampler, ahead, 0, "p2", "p1") == ["p1", "p2"]
    assert sampler.cancelled == [("p0", 0), ("p0", 1)]
    assert ahead.pending() == []


def test_nothing_is_sampled_beyond_the_end_of_the_run():
    sampler = Sampler(at_once=True)
    ahead = supply(sampler, steps=2, max_staleness=3)
    ahead.take(0)
    assert len([name for call in sampler.calls for name in call]) == 4
    ahead.take(1)
    assert len([name for call in sampler.calls for name in call]) == 4
    assert ahead.pending() == []


def test_prompts_that_a_stopped_run_had_drawn_are_sampled_first():
    sampler, source = Sampler(), Numbered()
    ahead = supply(sampler, source, max_staleness=1)
    assert at_once(sampler, ahead, 0, "p0", "p2") == ["p0", "p2"]
    pending, position = ahead.pending(), source.position()
    assert [(drawn.position["index"] + drawn.index) for drawn in pending] == [1, 3]

    again, other = Sampler(at_once=True), Numbered()
    other.seek(position)
    resumed = supply(again, other, pending, max_staleness=1)
    assert other.position() == position
    assert prompts_of(resumed.take(1)) == ["p1", "p3"]
    assert again.calls[0][:2] == ["p1", "p3"]


def test_a_prompt_that_is_alive_is_put_off_and_never_twice_in_a_step():
    """Four rows, two a step, up to six groups ahead: the source comes round before the first ones are trained on."""
    sampler = Sampler(at_once=True)
    source = RowSource([Prompt(name, "q", "a") for name in "abcd"], [], seed=3)
    ahead = supply(sampler, source, max_staleness=2, steps=40)
    counts = dict.fromkeys("abcd", 0)
    for step in range(40):
        names = prompts_of(ahead.take(step))
        assert len(set(names)) == 2
        for name in names:
            counts[name] += 1
    assert sum(counts.values()) == 80
    assert max(counts.values()) - min(counts.values()) <= 2  # epochs stay epochs


def test_groups_without_a_signal_are_replaced_ahead_of_their_step():
    sampler = Sampler()
    ahead = supply(sampler, max_staleness=1, dynamic=3)
    taking = Taking(ahead, 0)
    assert taking.is_waiting()
    sampler.finish_group("p0", ("right", "right"))
    sampler.finish_group("p1", ("wrong", "wrong"))
    assert taking.is_waiting()
    assert {name for name, _ in sampler.open} == {"p2", "p3", "p4", "p5"}  # two more for the two that left
    sampler.finish_group("p3")
    sampler.finish_group("p4")
    taken = taking.result.get(timeout=WAIT_S)
    assert prompts_of(taken) == ["p3", "p4"]
    assert len(taken.sampled) == 8  # the two that were replaced are told of too


def test_an_error_of_a_stage_is_raised_where_the_rollouts_are_taken():
    class Broken(Sampler):
        def generate(self, requests, decoding):
            yield from ()
            raise TrainingError("the engine has gone")

    with pytest.raises(TrainingError, match="the engine has gone"):
        supply(Broken()).take(0)


def test_completions_that_never_come_are_told_of():
    class Losing(Sampler):
        def generate(self, requests, decoding):
            return iter(())

    with pytest.raises(WorkerError, match=r"without all completions of 2 prompts \(first: p0\)"):
        supply(Losing()).take(0)


def test_a_sync_finds_nothing_being_sampled_where_completions_have_to_finish():
    sampler = Sampler()
    ahead = supply(sampler, max_staleness=1, partial="finish")
    assert at_once(sampler, ahead, 0, "p0", "p1") == ["p0", "p1"]
    settling = threading.Thread(target=ahead.settle, daemon=True)
    settling.start()
    settling.join(0.3)
    assert settling.is_alive()
    sampler.finish_group("p2")
    sampler.finish_group("p3")
    settling.join(WAIT_S)
    assert not settling.is_alive()
    assert ahead.metrics()["queue/ready_groups"] == 2


def test_a_sync_does_not_wait_where_completions_run_through_it():
    sampler = Sampler()
    ahead = supply(sampler, max_staleness=1, partial="resume")
    assert at_once(sampler, ahead, 0, "p0", "p1") == ["p0", "p1"]
    ahead.settle()
    assert ahead.metrics()["queue/in_flight_groups"] == 2


@pytest.mark.parametrize("rows", [0, 3, 4, 7])
@pytest.mark.parametrize("late", ["wait", "drop"])
def test_every_step_is_full_and_no_group_older_than_the_bound_whatever_finishes_when(late, rows):
    """Groups finish in an order drawn at random; the version that admitted each is what its completions carry.

    Three prompts a step out of as many rows, without end where it is 0. Where steps wait, nothing is given up.
    """
    rng = np.random.default_rng(0)
    for staleness in (0, 1, 2, 3):
        sampler = Sampler()
        source = RowSource([Prompt(f"p{row}", "q", "a") for row in range(rows)], [], seed=1) if rows else Numbered()
        ahead = supply(sampler, source, prompts=3, steps=30, max_staleness=staleness, late=late)
        for step in range(30):
            sampler.version = step
            taking = Taking(ahead, step)
            while taking.result.empty():
                names = sorted({name for name, sample in list(sampler.open) if sample == 0})
                if names:
                    sampler.finish_group(names[rng.integers(len(names))])
                taking.thread.join(0.003)
            taken = taking.result.get()
            assert len(set(prompts_of(taken))) == len(prompts_of(taken)) == 3
            oldest = min(item.graded.rollout.oldest_version for item in taken.annotated)
            assert step - oldest <= staleness
            if late == "wait":
                assert not sampler.cancelled
                assert ahead.metrics().get("queue/dropped_groups", 0) == 0


def test_drawn_prompts_survive_a_trip_through_json():
    import json

    drawn = Drawn({"epoch": 1, "offset": 8}, 4, 2)
    assert Drawn(**json.loads(json.dumps(drawn.__dict__))) == drawn
