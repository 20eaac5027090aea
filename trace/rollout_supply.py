"""Where a step's rollouts come from: prompts are sampled, graded and annotated by groups, ahead of the step or for it.

Decides when a prompt is sampled, which complete groups a step trains on, and which are given up. Synchronous training
is the supply that is never ahead: each step admits its own prompts and takes them all. Must not know engines, routes,
rewards or time: stages are iterators (`trace_rl.protocols`), pulled by a thread for each admission.

Invariants:
* a group that step k trains on was admitted at version k - max_staleness or later, so no token of it is older;
* at most (max_staleness + 1) * prompts_per_step groups, and the surplus of oversampling, are sampled or wait;
* two groups of one prompt are never alive together, so (prompt, sample) is an identity;
* every prompt that was drawn leaves once: trained on, replaced because it has no signal, or given up; with late = wait
  none is given up but what dynamic sampling has drawn beyond its need. Those that have not left are `pending`.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from trace_rl.batch import AnnotatedRollout, GradedRollout, Prompt, RolloutKey
from trace_rl.config.run import RunConfig
from trace_rl.errors import PreemptedError, WorkerError
from trace_rl.ledger import Passage, accounted
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import Annotator, Decoding, Drawn, Generator, Grader, Metrics, PromptLedger, PromptSource
from trace_rl.routing import active_span_classes

_LIVENESS_S = 1.0  # between two looks whether the threads that bring rollouts still live
_LAST_WAIT_S = 10.0  # for threads whose completions were all given up


OnGroup = Callable[[int, Sequence[AnnotatedRollout]], None]
"""Is told of a prompt whose completions are all there: its place, and they."""


def _ignore(place: int, group: Sequence[AnnotatedRollout]) -> None:
    """Nobody wants to be told of it."""


class Stages(Protocol):
    """What `trace_rl.loop.Roles` has of the way from a prompt to an annotated rollout."""

    @property
    def prompts(self) -> PromptSource: ...

    @property
    def encoder(self) -> PromptEncoder: ...

    @property
    def sampler(self) -> Generator: ...

    @property
    def grader(self) -> Grader: ...

    @property
    def annotator(self) -> Annotator: ...

    @property
    def ledger(self) -> PromptLedger: ...


@dataclass(frozen=True)
class Taken:
    """What a step gets."""

    annotated: Sequence[AnnotatedRollout]
    """Completions to train on; all those of a prompt, or none."""
    sampled: Sequence[GradedRollout]
    """Those, and complete groups that were replaced or given up since the step before."""
    prompts: Mapping[str, str]
    """Those of `annotated`, as a `PromptLedger` takes them."""


@dataclass
class _Group:
    """A prompt whose completions are being sampled, or wait for their step."""

    number: int
    """In the order of admission."""
    wave: int
    """The admission that it came with."""
    version: int
    """Of the weights when it was admitted: no token is older."""
    prompt: Prompt
    drawn: Drawn
    size: int
    members: list[AnnotatedRollout] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.members) == self.size

    @property
    def is_uniform(self) -> bool:
        """Whether all completions earn the same, so that advantages within the group vanish."""
        return len({member.graded.reward for member in self.members}) == 1


@dataclass(frozen=True)
class _End:
    """A thread has pulled everything, or failed with `error`."""

    error: BaseException | None = None


class RolloutSupply:
    """Groups on their way from the prompt source to a training step.

    Args:
        pending: prompts that an earlier run had drawn and not trained on; they are sampled first.
        is_told_to_end: asked about once a second while a step waits for its rollouts.
    """

    def __init__(
        self,
        config: RunConfig,
        stages: Stages,
        pending: Iterable[Drawn] = (),
        is_told_to_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._stages = stages
        self._is_told_to_end = is_told_to_end
        self._size = config.sampling.prompts_per_step
        self._staleness = config.scheduling.max_staleness
        self._surplus = math.ceil(config.scheduling.oversampling_frac * self._size)
        self._groups: dict[tuple[int, str], _Group] = {}
        """Alive, in the order of admission; by wave and prompt."""
        self._left: list[_Group] = []
        """Given up, or found without a signal, since the step before."""
        self._put_off = _drawn_again(stages.prompts, pending)
        self._numbers, self._waves = itertools.count(), itertools.count()
        self._events: SimpleQueue[tuple[int, AnnotatedRollout | _End]] = SimpleQueue()
        self._threads: dict[int, threading.Thread] = {}
        self._replaces = False
        """Whether groups without a signal are replaced at this step."""
        self._on_group: OnGroup = _ignore
        self._first_number = 0
        """Of the groups of this step."""
        self._num_dropped = 0
        self._num_in_flight = 0
        """Groups that are not complete: counted, because every arrival asks."""

    def take(self, step: int, on_group: OnGroup = _ignore) -> Taken:
        """The completions that this step trains on, once they are there; admits prompts for it and for later steps.

        Args:
            on_group: told of prompts whose completions come while this step waits, where groups without a signal are
                not replaced. In synchronous training without oversampling these are all that it trains on. Their
                places are counted from the oldest that was alive when it began to wait.

        Raises:
            TraceError: what a stage raised, now or since the step before.
            PreemptedError: the run was told to end; what was admitted is `pending`.
        """
        self._replaces = self._may_replace(step)
        self._book_all()
        self._admit(step, self._missing(step))
        self._first_number = min((group.number for group in self._groups.values()), default=0)
        self._on_group = on_group
        try:
            return self._await(step)
        finally:
            self._on_group = _ignore

    def _await(self, step: int) -> Taken:
        rounds = self._config.algorithm.dynamic_sampling.max_rounds - 1 if self._replaces else 0
        while True:
            if rounds and (count := self._replacements(step)):
                self._admit(step, count)
                rounds -= 1
            elif self._num_in_flight and not self._is_served(step):
                if self._is_told_to_end():
                    raise PreemptedError(f"the run was told to end while step {step} waited for its rollouts")
                self._wait(_LIVENESS_S)
                self._book_all()
            else:
                return self._choose(step)

    def settle(self) -> None:
        """Wait for what is being sampled, where a sync must not find any (scheduling.partial = finish)."""
        while self._num_in_flight and self._config.scheduling.partial == "finish":
            self._wait(_LIVENESS_S)

    def close(self, step: int) -> None:
        """End what is still being sampled, at the end of a run of so many steps; what is left counts as dropped."""
        self._give_up(list(self._groups.values()))
        self._stages.ledger.note("dropped", step, accounted((group.prompt, group.drawn) for group in self._left))
        self._stages.ledger.note("dropped", step, accounted(self._put_off))
        for thread in self._threads.values():
            thread.join(_LAST_WAIT_S)

    def pending(self) -> list[Drawn]:
        """Prompts that were drawn and are neither trained on nor given up, oldest first: to be drawn again."""
        return [*(group.drawn for group in self._groups.values()), *(drawn for _, drawn in self._put_off)]

    def metrics(self) -> Metrics:
        """Depths of the queues after the last `take`, and what it gave up; nothing where every step takes its own."""
        if not (self._staleness or self._surplus):
            return {}
        return {
            "queue/in_flight_groups": float(self._num_in_flight),
            "queue/ready_groups": float(len(self._groups) - self._num_in_flight),
            "queue/dropped_groups": float(self._num_dropped),
        }

    def _may_replace(self, step: int) -> bool:
        """Whether groups without a signal are replaced; not while any route learns from them too."""
        if self._config.algorithm.dynamic_sampling.max_rounds == 1:
            return False
        routes = self._config.algorithm.routes.values()
        return not any(route.is_active(later) for route in routes for later in self._steps_ahead(step))

    def _steps_ahead(self, step: int) -> range:
        """Steps that may train on what is admitted now."""
        return range(step, min(step + self._staleness, self._config.run.steps - 1) + 1)

    def _deadline(self, group: _Group) -> int:
        """The last step that may train on the group."""
        return group.version + self._staleness

    def _is_served(self, step: int) -> bool:
        """Whether enough groups are complete for this step to leave none behind that later steps cannot take in time.

        Of the groups whose last step is d or earlier, (d - step) * prompts_per_step fit into the steps from the next
        one to d; where none may be given up, all others have to be taken now.
        """
        if len(self._groups) - self._num_in_flight < self._size:
            return False
        if self._config.scheduling.late == "drop":
            return True
        num_alive = num_complete = 0
        for last, groups in itertools.groupby(self._groups.values(), key=self._deadline):  # the oldest come first
            for group in groups:
                num_alive += 1
                num_complete += group.is_complete
            later = (last - step) * self._size
            # of more than a step needs it must not depend on their order of arrival which it gets
            needed = min(self._size, num_alive - later) if later else num_alive
            if num_complete < needed:
                return False
        return True

    def _missing(self, step: int) -> int:
        """How many groups there is room for."""
        return max(0, len(self._steps_ahead(step)) * self._size + self._surplus - len(self._groups))

    def _replacements(self, step: int) -> int:
        """How many prompts to admit for groups that had no signal.

        They come by whole steps: how many are needed follows from the share that has a signal, which nobody knows.
        """
        missing = self._missing(step)
        whole = missing // self._size * self._size
        return whole or (self._size if missing and not self._num_in_flight else 0)

    def _admit(self, step: int, count: int) -> None:
        """Have up to `count` further prompts sampled: fewer where the source repeats prompts that are alive."""
        chosen = self._draw(step, count)
        if not chosen:
            return
        wave = next(self._waves)
        samples = self._config.sampling.samples_per_prompt
        for prompt, drawn in chosen:
            group = _Group(next(self._numbers), wave, step, prompt, drawn, samples)
            self._groups[wave, prompt.prompt_id] = group
        self._num_in_flight += len(chosen)
        sampling, stages = self._config.sampling, self._stages
        prompts = [prompt for prompt, _ in chosen]
        requests = stages.encoder.requests(prompts, samples, self._config.run.seed, "train", step)
        decoding = Decoding(sampling.temperature, sampling.top_p, sampling.top_k)
        passage = Passage(stages.ledger, step, {prompt.prompt_id: drawn for prompt, drawn in chosen}, samples)
        finished = passage.note("finished", stages.sampler.generate(requests, decoding), lambda item: item)
        graded = passage.note("graded", stages.grader.grade(finished), lambda item: item.rollout)
        classes = frozenset().union(*(active_span_classes(self._config, later) for later in self._steps_ahead(step)))
        rollouts = stages.annotator.annotate(graded, classes)
        annotated = passage.note("annotated", rollouts, lambda item: item.graded.rollout)
        thread = threading.Thread(target=self._pull, args=(wave, annotated), daemon=True, name=f"rollouts {wave}")
        self._threads[wave] = thread
        thread.start()

    def _draw(self, step: int, count: int) -> list[tuple[Prompt, Drawn]]:
        """The next prompts: those that were put off first. One that is alive already is put off.

        Where enough are alive for a step, none is drawn beyond one that had to be put off, so that epochs stay epochs.
        """
        alive = {prompt_id for _, prompt_id in self._groups}
        chosen: list[tuple[Prompt, Drawn]] = []
        source = self._stages.prompts
        offered, self._put_off = self._put_off, []
        while True:
            for prompt, drawn in offered:
                if prompt.prompt_id in alive or len(chosen) == count:
                    self._put_off.append((prompt, drawn))
                else:
                    alive.add(prompt.prompt_id)
                    chosen.append((prompt, drawn))
            if len(chosen) == count or (self._put_off and len(alive) >= self._size):
                return chosen
            asked = min(count - len(chosen), self._size)
            position = dict(source.position())
            offered = [(prompt, Drawn(position, asked, index)) for index, prompt in enumerate(source.take(asked))]
            self._stages.ledger.note("issued", step, accounted(offered))

    def _pull(self, wave: int, annotated: Iterator[AnnotatedRollout]) -> None:
        try:
            for item in annotated:
                self._events.put((wave, item))
            self._events.put((wave, _End()))
        except BaseException as error:  # raised again where the rollouts are taken
            self._events.put((wave, _End(error)))

    def _wait(self, patience_s: float) -> None:
        """Book the next rollout, if one comes in time; every stage bounds its own waits."""
        is_alive = any(thread.is_alive() for thread in self._threads.values())
        try:
            self._book(*self._events.get(timeout=patience_s if is_alive else 0))
        except Empty:
            if not is_alive:
                raise WorkerError("the threads that bring rollouts ended without a word: report this") from None

    def _book_all(self) -> None:
        """Book all rollouts that have come."""
        while not self._events.empty():
            self._book(*self._events.get())

    def _book(self, wave: int, event: AnnotatedRollout | _End) -> None:
        if isinstance(event, _End):
            del self._threads[wave]
            if event.error is not None:
                raise event.error
            self._check_none_is_lost(wave)
            return
        group = self._groups.get((wave, event.graded.rollout.prompt.prompt_id))
        if group is None:
            return  # was given up meanwhile
        group.members.append(event)
        if not group.is_complete:
            return
        self._num_in_flight -= 1
        if not self._replaces:
            self._on_group(group.number - self._first_number, group.members)
        elif group.is_uniform:
            self._leave(group)

    def _check_none_is_lost(self, wave: int) -> None:
        lacking = [group for group in self._groups.values() if group.wave == wave and not group.is_complete]
        if lacking:
            raise WorkerError(
                f"sampling, grading or annotating ended without all completions of {len(lacking)} prompts (first: "
                f"{lacking[0].prompt.prompt_id}): report this as a bug"
            )

    def _leave(self, group: _Group) -> None:
        del self._groups[group.wave, group.prompt.prompt_id]
        self._num_in_flight -= not group.is_complete
        self._left.append(group)

    def _choose(self, step: int) -> Taken:
        """The oldest complete groups; gives up what would be too old at the next step."""
        self._book_all()
        chosen = [group for group in self._groups.values() if group.is_complete][: self._size]
        if not chosen and self._replaces:  # a step is never empty: the last ones are trained on, whatever they earn
            chosen = [group for group in self._left if group.wave == self._left[-1].wave][: self._size]
        for group in chosen:
            self._groups.pop((group.wave, group.prompt.prompt_id), None)
        dropped = [group for group in self._groups.values() if self._deadline(group) <= step]
        self._give_up(dropped)
        self._num_dropped = len(dropped)
        gone = {group.number: group for group in (*chosen, *self._left)}
        taken = {group.number for group in chosen}
        lost = [(group.prompt, group.drawn) for group in self._left if group.number not in taken]
        self._stages.ledger.note("dropped", step, accounted(lost))
        self._left = []
        return Taken(
            annotated=[member for group in chosen for member in group.members],
            sampled=[member.graded for group in gone.values() if group.is_complete for member in group.members],
            prompts=accounted((group.prompt, group.drawn) for group in chosen),
        )

    def _give_up(self, groups: Sequence[_Group]) -> None:
        unfinished = [
            RolloutKey(group.prompt.prompt_id, sample)
            for group in groups
            if not group.is_complete
            for sample in set(range(group.size)) - {member.graded.rollout.sample for member in group.members}
        ]
        if unfinished:
            self._stages.sampler.cancel(unfinished)
        for group in groups:
            self._leave(group)


def _drawn_again(source: PromptSource, pending: Iterable[Drawn]) -> list[tuple[Prompt, Drawn]]:
    """The prompts themselves; leaves the source where it was."""
    position: Mapping[str, Any] = dict(source.position())
    prompts = []
    for drawn in pending:
        source.seek(drawn.position)
        prompts.append((source.take(drawn.count)[drawn.index], drawn))
    source.seek(position)
    return prompts
