"""The teacher: scores the student's own tokens under privileged context, and returns states instead of logits.

`TeacherModel` becomes a Ray actor and holds a copy of the policy; `RayTeacher` is its side on the driver and decides
when the copy is refreshed. What leaves the actor is the final hidden state (behind the last norm) of each routed row,
`hidden` numbers a row instead of `vocab`, and the output head once a refresh; the learner multiplies the two.

Rollouts without routed tokens are never sent, and sequences end behind their last routed token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from safetensors.torch import load_file, save_file

from trace_rl.batch import TeacherRequest, TeacherRows
from trace_rl.config.roles import Model, TeacherWeights
from trace_rl.config.roles import Teacher as TeacherSettings
from trace_rl.errors import CheckpointError
from trace_rl.packing import length_batches, predicting_positions, right_pad
from trace_rl.workers.policy_model import final_hidden, head_weight, load_policy
from trace_rl.workers.waiting import wait_for

_STATE_FILE = "teacher.safetensors"


class TeacherSource(Protocol):
    """The learner as the teacher sees it: where weights come from and where the head goes to."""

    def export_state(self) -> Iterable[ObjectRef[dict[str, torch.Tensor]]]:
        """The policy's weights in buckets, in the order of a Hugging Face state dict."""
        ...

    def set_teacher_head(self, head: ObjectRef[torch.Tensor]) -> None:
        """Give every rank the head [vocab, hidden] that belongs to the rows of the coming steps."""
        ...


class TeacherModel:
    """A frozen causal LM that is read, never trained."""

    def __init__(self, model: Model, settings: TeacherSettings) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_policy(model, self._device).eval().requires_grad_(False)
        self._max_tokens = settings.max_tokens_per_batch

    def ready(self) -> bool:
        return True

    def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        """One forward per batch of similar lengths; returns rows in the order of the requests."""
        rows: dict[int, TeacherRows] = {}
        for indices in length_batches([_length(request) for request in requests], self._max_tokens):
            batch = [requests[index] for index in indices]
            rows |= dict(zip(indices, self._score_batch(batch), strict=True))
        return [rows[index] for index in range(len(requests))]

    def load_bucket(self, bucket: dict[str, torch.Tensor]) -> None:
        """Copy a part of the policy's weights into the teacher."""
        own = self._model.state_dict()
        for name, value in bucket.items():
            own[name].copy_(value)

    def head(self) -> torch.Tensor:
        """The output head [vocab, hidden]."""
        return head_weight(self._model).detach().cpu().clone()

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        named = dict(self._model.named_parameters())  # tied weights once
        save_file({name: value.detach().cpu().contiguous() for name, value in named.items()}, path / _STATE_FILE)

    def load(self, path: Path) -> None:
        if not (path / _STATE_FILE).is_file():
            raise CheckpointError(
                f"{path} holds no copy of the teacher ({_STATE_FILE} is missing); a checkpoint of a method without "
                "routes can be resumed by such a method only, or be the model.path of a new run"
            )
        self.load_bucket(load_file(path / _STATE_FILE))

    @torch.no_grad()
    def _score_batch(self, batch: Sequence[TeacherRequest]) -> Iterator[TeacherRows]:
        padded = right_pad([request.teacher_prompt_token_ids + request.token_ids for request in batch])
        hidden = final_hidden(self._model, *(tensor.to(self._device) for tensor in padded))
        for index, request in enumerate(batch):
            rows = torch.from_numpy(predicting_positions(len(request.teacher_prompt_token_ids), request.positions))
            yield TeacherRows(request.key, hidden[index, rows.to(self._device)].float().cpu().numpy())


class RayTeacher:
    """The driver's side: implements `trace_rl.protocols.Teacher`."""

    def __init__(self, actor: ActorHandle, source: TeacherSource, weights: TeacherWeights, timeout_s: float) -> None:
        self._actor = actor
        self._source = source
        self._weights = weights
        self._timeout_s = timeout_s
        self._has_sent_head = False

    def refresh(self, step: int) -> bool:
        """Copy the policy's weights where the teacher's policy asks for it, and ship the head that goes with them."""
        is_due = self._weights.type == "live" or (self._weights.type == "periodic" and step % self._weights.every == 0)
        if is_due:
            for bucket in self._source.export_state():
                self._wait(self._actor.load_bucket.remote(bucket), "loading the policy's weights")
        if is_due or not self._has_sent_head:
            self._source.set_teacher_head(self._actor.head.remote())
            self._has_sent_head = True
        return is_due

    def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        return self._wait(self._actor.score.remote(list(requests)), "scoring") if requests else []

    def save(self, path: Path) -> None:
        self._wait(self._actor.save.remote(path), "saving its weights")

    def load(self, path: Path) -> None:
        self._wait(self._actor.load.remote(path), "loading its weights")
        self._has_sent_head = False

    def _wait(self, ref: Any, doing: str) -> Any:
        return wait_for(ref, self._timeout_s, "the teacher", doing)


def _length(request: TeacherRequest) -> int:
    return len(request.teacher_prompt_token_ids) + len(request.token_ids)
