"""The teacher: scores the student's own tokens under privileged context, and returns only what is asked of it.

`TeacherModel` becomes a Ray actor and holds the models whose logits are mixed; `RayTeacher` is its side on the driver
and moves the policy's weights into it. What leaves the actor for a divergence is the final hidden state (behind the
last norm) of each wanted row, `hidden` numbers a row instead of `vocab`, and the output head; the learner multiplies
the two. Where only log-probs or entropies are read, no state and no head is shipped. States are shipped as they were
computed, unless `teacher.states` asks for fewer bits.

Invariants:
* logits = hidden @ head.T, for every kind of weights: a mix of models is one product, of the scaled states side by side
  with the heads side by side. Scaling rounds the states of a mix once, to the models' precision; the learner and the
  teacher's own log-probs read the same rounded numbers.
* The state of a resumed teacher equals that of the uninterrupted one: what depends on earlier steps is saved, all else
  is made again from the start weights and the policy.

Rollouts without routed tokens are never sent, and sequences end behind their last wanted token; what else is left out
is decided by `trace_rl.workers.state_reader`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from ray import ObjectRef
from ray.actor import ActorHandle
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trace_rl.batch import TeacherRequest, TeacherRows
from trace_rl.config.roles import Model
from trace_rl.config.teacher import Teacher as TeacherSettings
from trace_rl.config.teacher import TeacherWeights
from trace_rl.errors import CheckpointError, DeadlineError, ModelError, TraceError, WorkerError
from trace_rl.flops import TeacherCost
from trace_rl.protocols import StoredFile
from trace_rl.reply_checks import rows_fault
from trace_rl.states import states_array
from trace_rl.workers import life
from trace_rl.workers.checkpoint_files import seal
from trace_rl.workers.idle import IdleMeter
from trace_rl.workers.life import new_life
from trace_rl.workers.policy_model import head_weight, load_policy
from trace_rl.workers.revival import RestartedError, life_of
from trace_rl.workers.state_reader import StateReader
from trace_rl.workers.waiting import wait_for

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_STATE_FILE = "teacher.safetensors"
_NAME = "the teacher"
_ROWS_PER_PRODUCT = 512
"""Rows that are projected to the vocabulary at a time: 0.3 GB in float32 for 152 000 entries."""


class TeacherSource(Protocol):
    """The learner as the teacher sees it: where weights come from and where the head goes to."""

    def export_state(self) -> Iterable[ObjectRef[dict[str, Tensor]]]:
        """The policy's weights in buckets, in the order of a Hugging Face state dict."""
        ...

    def set_teacher_head(self, head: ObjectRef[Tensor]) -> None:
        """Give every rank the head [vocab, hidden] that belongs to the rows of the coming steps."""
        ...


class TeacherModel:
    """Causal LMs that are read, never trained.

    Args:
        vocab_size: rows of the policy's output head. What a teacher's head has beyond them is padding and is cut.

    Raises:
        ModelError: a model cannot be loaded, or its vocabulary is smaller than the policy's.
    """

    def __init__(self, model: Model, settings: TeacherSettings, vocab_size: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._weights = settings.weights
        self._vocab_size = vocab_size
        self._is_rounded = settings.states == "bfloat16"
        start = model.model_copy(update={"path": settings.weights.start_path(model.path)})
        setting = "model.path" if start.path == model.path else "teacher.weights.path"
        self._models = [
            load_policy(start, self._device, setting).eval().requires_grad_(False) for _ in settings.weights.shares()
        ]
        self._reader = StateReader(self._models, settings.max_tokens_per_batch)
        found = len(head_weight(self._models[0]))
        if found < vocab_size:
            raise ModelError(
                f"{setting}: the output head of {start.path!r} has {found} rows, fewer than the {vocab_size} of the "
                "policy, so it cannot score the policy's tokens; choose a teacher with the policy's tokenizer"
            )
        moving = self._models[-1].named_parameters()  # tied weights once
        self._average = {n: v.float().cpu().clone() for n, v in moving} if settings.weights.is_average else {}
        self._life = new_life()
        life.begin(self._life)

    def ready(self) -> bool:
        return True

    def life(self) -> str:
        """See `trace_rl.workers.revival`; each begins with the start weights."""
        return self._life

    def in_life(self, life: str, method: str, *args: Any) -> Any:
        """`method(*args)`.

        Raises:
            RestartedError: this is another life.
        """
        if life != self._life:
            raise RestartedError("the teacher died and was started again")
        return getattr(self, method)(*args)

    def cost(self) -> TeacherCost:
        """Of a request, with the part of the head that is used."""
        return self._reader.cost(self._vocab_size)

    def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        """One forward per model and batch; returns rows in the order of the requests."""
        rows: dict[int, TeacherRows] = {}
        for indices in self._reader.batches(requests):
            batch = [requests[index] for index in indices]
            for index, request, states in zip(indices, batch, self._reader.read(batch), strict=True):
                rows[index] = self._rows(request, states)
        return [rows[index] for index in range(len(requests))]

    def load_bucket(self, bucket: dict[str, Tensor], rate: float) -> None:
        """Move a part of the weights toward the policy's: phi <- (1 - rate) phi + rate theta.

        A rate between 0 and 1 needs the float32 average of `TeacherWeights.is_average`.
        """
        own = self._models[-1].state_dict()
        for name, value in bucket.items():
            if name in self._average:
                value = self._average[name].lerp_(value.float().cpu(), rate)
            own[name].copy_(value)

    def head(self) -> Float[Tensor, "vocab hidden"]:
        """The output head that belongs to the states of the rows; of several models side by side."""
        return torch.cat([head.cpu() for head in self._heads()], dim=-1).clone()

    def save(self, path: Path) -> dict[str, StoredFile]:
        """Write what depends on earlier steps; other kinds of weights leave nothing behind.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        if self._weights.depends_on != "history":
            return {}
        named = {name: value.detach().cpu().contiguous() for name, value in self._models[-1].named_parameters()}
        try:
            path.mkdir(parents=True, exist_ok=True)
            save_file(self._average or named, path / _STATE_FILE)
            return seal(path, [path / _STATE_FILE])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the teacher failed to write to {path}: {error}") from error

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it lacks a copy that is needed, or has one that this kind of weights would ignore.
        """
        file = path / _STATE_FILE
        if self._weights.depends_on == "history":
            self._load_copy(file)
        elif self._weights.depends_on == "start" and file.is_file() and not self._equals(load_file(file)):
            raise CheckpointError(
                f"{file} holds a copy of a teacher that is not the one of teacher.weights.type = "
                f"{self._weights.type}; set teacher.weights to what the run was started with, or start a new run"
            )

    def _load_copy(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(
                f"{file.parent} holds no copy of the teacher ({file.name} is missing), which teacher.weights.type = "
                f"{self._weights.type} goes on from; set algorithm and teacher.weights to what the run was started "
                "with, or make its weights the model.path of a new run"
            )
        state = load_file(file)
        if self._weights.is_average:
            self._average = {name: value.float() for name, value in state.items()}
        own = self._models[-1].state_dict()
        for name, value in state.items():
            own[name].copy_(value)

    def _equals(self, state: dict[str, Tensor]) -> bool:
        own = dict(self._models[-1].named_parameters())
        return own.keys() == state.keys() and all(torch.equal(own[name].cpu(), state[name]) for name in own)

    @torch.no_grad()
    def _rows(self, request: TeacherRequest, states: Sequence[Float[Tensor, "row _"]]) -> TeacherRows:
        """What the request asks for, from the states of each model; the rest has no rows."""
        scaled = [share * each for share, each in zip(self._weights.shares(), states, strict=True)]
        logprobs, entropy = torch.zeros(0), torch.zeros(0)
        if request.outputs & {"logprobs", "entropy"}:
            targets = torch.tensor([request.token_ids[position] for position in request.positions], device=self._device)
            chunks = [
                self._logprobs_and_entropy(*chunk, request.temperature)
                for chunk in zip(
                    zip(*(each.split(_ROWS_PER_PRODUCT) for each in scaled), strict=True),
                    targets.split(_ROWS_PER_PRODUCT),
                    strict=True,
                )
            ]
            logprobs, entropy = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        wanted = len(request.positions)
        hidden = torch.cat(scaled, dim=-1)[: wanted if "states" in request.outputs else 0]
        return TeacherRows(
            key=request.key,
            view=request.view,
            positions=request.positions,
            hidden=states_array(hidden.bfloat16() if self._is_rounded else hidden),
            logprobs=logprobs[: wanted if "logprobs" in request.outputs else 0].cpu().numpy(),
            entropy=entropy[: wanted if "entropy" in request.outputs else 0].cpu().numpy(),
        )

    def _logprobs_and_entropy(
        self, states: Sequence[Float[Tensor, "row _"]], targets: Tensor, temperature: float
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """log q of the targets, and the entropy of q in nats, over the policy's vocabulary."""
        products = [(each @ head.T).float() for each, head in zip(states, self._heads(), strict=True)]
        logprobs = torch.log_softmax(sum(products[1:], products[0]) / temperature, dim=-1)
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)

    def _heads(self) -> list[Float[Tensor, "vocab _"]]:
        return [head_weight(model).detach()[: self._vocab_size] for model in self._models]


class RayTeacher:
    """The driver's side: implements `trace_rl.protocols.Teacher`.

    A teacher that dies while it is refreshed or scores is waited for, is given the policy's weights where it had them,
    and does its work again. What only it had, a copy of an earlier policy, cannot be given back: that is an error.

    Args:
        timeout_s: deadline of one call.
        start_timeout_s: how long it is waited for where Ray starts it again.
    """

    def __init__(
        self,
        actor: ActorHandle,
        source: TeacherSource,
        weights: TeacherWeights,
        timeout_s: float,
        start_timeout_s: float = 300.0,
    ) -> None:
        self._actor = actor
        self._source = source
        self._weights = weights
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._is_head_current = False
        self._needs: Literal["nothing", "policy", "copy"] = "nothing"
        """What it would have to be given in another life: the policy as it is now, or a copy of an earlier one."""
        self.idle = IdleMeter()
        self._life = life_of(actor, _NAME, start_timeout_s)

    def cost(self) -> TeacherCost:
        """Of a request."""
        found: TeacherCost = self._call("cost", doing="counting its parameters")
        return found

    def refresh(self, step: int) -> bool:
        """Move the teacher's weights toward the policy's as their kind asks for, once before a step is scored."""
        rate = self._weights.rate_at(step)
        if self._needs == "policy":  # which has changed since
            self._needs = "copy"
        if rate == 0:
            return False
        if rate == 1:  # whatever it holds is replaced
            self._needs = "nothing"
        self._surviving(lambda: self._move(rate))
        self._needs = "policy" if rate == 1 else "copy"
        return True

    def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        """Score, and give the learner the head that belongs to the states when it has another one."""
        return self._surviving(lambda: self._score(requests)) if requests else []

    def save(self, path: Path) -> dict[str, StoredFile]:
        if self._weights.depends_on == "history" and self._needs == "policy":
            self._needs = "copy"  # the learner may have trained since
        return self._surviving(lambda: self._save(path))

    def load(self, path: Path) -> None:
        self._call("load", path, doing="loading its weights")
        self._is_head_current = False
        self._needs = "copy" if self._weights.depends_on == "history" else "nothing"

    def _move(self, rate: float) -> None:
        for bucket in self._source.export_state():
            self._call("load_bucket", bucket, rate, doing="loading the policy's weights")
        self._is_head_current = False

    def _score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        if not self._is_head_current and any("states" in request.outputs for request in requests):
            self._source.set_teacher_head(self._actor.in_life.remote(self._life, "head"))
            self._is_head_current = True
        rows: list[TeacherRows] = self._call("score", list(requests), doing="scoring")
        if len(rows) != len(requests):
            raise WorkerError(f"{_NAME} answered {len(rows)} of {len(requests)} requests; look at its log")
        for request, found in zip(requests, rows, strict=True):
            if fault := rows_fault(found, request):
                raise WorkerError(f"{_NAME} garbled its answer on {request.key}: {fault}; look at its log")
        return rows

    def _surviving(self, work: Callable[[], Result]) -> Result:
        """What work returns, done again as often as the teacher dies and comes back."""
        while True:
            try:
                return work()
            except DeadlineError:
                raise
            except TraceError as error:
                if (life := life_of(self._actor, _NAME, self._start_timeout_s)) == self._life:
                    raise
                logger.warning("%s; it is back, and its work is done again", error)
                self._life, self._is_head_current = life, False
                self._restore(error)

    def _restore(self, error: TraceError) -> None:
        if self._needs == "policy":
            self._surviving(lambda: self._move(1.0))
        elif self._needs == "copy":
            raise WorkerError(
                f"{error}; its copy of the policy (teacher.weights.type = {self._weights.type}) was in its memory and "
                "in the last checkpoint only"
            ) from error

    def _save(self, path: Path) -> dict[str, StoredFile]:
        written: dict[str, StoredFile] = self._call("save", path, doing="saving its weights")
        return written

    def _call(self, method: str, *args: Any, doing: str) -> Any:
        with self.idle.busy():
            return wait_for(self._actor.in_life.remote(self._life, method, *args), self._timeout_s, _NAME, doing)
