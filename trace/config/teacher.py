"""Settings of the teacher: what it knows, which weights it scores with, and how its prompt is rendered.

A kind of weights says where they start, how they move with the policy and how several models are mixed; the worker
carries that out without knowing the kinds. This module must not know how weights are moved or stored.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field

from trace_rl.config.base import Kind, Section
from trace_rl.contexts import Context


class TeacherWeights(Kind):
    """The weights phi_k that score at the 0-based training step k; theta_k is the policy before that step.

    A teacher has one or more models that start from the same files. Its logits are the sum of theirs, each times its
    share. Only the last one moves: phi <- (1 - rate) phi + rate theta_k before step k.
    """

    depends_on: ClassVar[Literal["start", "policy", "history"]]
    """What phi_k is made of: the files it was started from; those and the policy of the step; or earlier steps too,
    so that a checkpoint has to hold it."""
    is_average: ClassVar[bool] = False
    """Whether small parts of the policy add up over steps, which takes float32 whatever the model's precision."""

    @abstractmethod
    def rate_at(self, step: int) -> float:
        """Share of the policy that the moving weights take over before step k; 0: they stay."""

    def shares(self) -> tuple[float, ...]:
        """Factor of each model's logits, the moving one last."""
        return (1.0,)

    def start_path(self, policy_path: str) -> str:
        """Folder or hub name that the weights start from."""
        return policy_path


class Live(TeacherWeights):
    """phi_k = theta_k: the policy of the step."""

    type: Literal["live"] = "live"
    depends_on = "policy"

    def rate_at(self, step: int) -> float:
        return 1.0


class Periodic(TeacherWeights):
    """phi_k = theta_j with j = every * floor(k / every): a copy made every few steps (arXiv:2605.10194)."""

    type: Literal["periodic"] = "periodic"
    depends_on = "history"
    every: int = Field(10, ge=1)
    """Steps between copies."""

    def rate_at(self, step: int) -> float:
        return float(step % self.every == 0)


class Frozen(TeacherWeights):
    """phi_k = theta_0: the start weights of the run (arXiv:2601.18734)."""

    type: Literal["frozen"] = "frozen"
    depends_on = "start"

    def rate_at(self, step: int) -> float:
        return 0.0


class Ema(TeacherWeights):
    """phi_k = (1 - rate) phi_{k-1} + rate theta_k from phi = theta_0: an exponential moving average (arXiv:2601.20802).

    The average is kept in float32: in bfloat16 a small rate would round to no change at all.
    """

    type: Literal["ema"] = "ema"
    depends_on = "history"
    is_average = True
    rate: float = Field(0.05, gt=0, le=1)
    """Share of the policy that the average takes over before each step in which the teacher scores."""

    def rate_at(self, step: int) -> float:
        return self.rate


class TrustRegion(TeacherWeights):
    """logits = (1 - mix) logits(theta_0) + mix logits(theta_k): held near the start weights (arXiv:2601.20802).

    Takes the memory and time of two models.
    """

    type: Literal["trust_region"] = "trust_region"
    depends_on = "policy"
    mix: float = Field(0.05, ge=0, le=1)
    """Share of the policy's logits; the rest is that of the start weights."""

    def rate_at(self, step: int) -> float:
        return 1.0

    def shares(self) -> tuple[float, ...]:
        return 1 - self.mix, self.mix


class External(TeacherWeights):
    """Another model that stays as it is (arXiv:2306.13649)."""

    type: Literal["external"] = "external"
    depends_on = "start"
    path: str
    """Folder or hub name of a Hugging Face causal LM with the policy's tokenizer; sizes and layers may be others."""

    def rate_at(self, step: int) -> float:
        return 0.0

    def start_path(self, policy_path: str) -> str:
        return self.path


class Teacher(Section):
    context: Context = Context(pieces=("type_label",))
    """What the teacher knows beyond the question: `none`, a piece such as `type_label`, a list, or a mapping."""
    weights: TeacherWeights = Periodic()
    """Which weights it scores with."""
    chat_template_kwargs: dict[str, Any] = {}
    """On top of model.chat_template_kwargs for the teacher's prompt only, for example {enable_thinking: true} beside a
    student that does not think. Without any, both prompts are rendered alike."""
    max_tokens_per_batch: int = Field(16384, ge=1)
    """Padded tokens of one teacher forward. Prompts are scored while others are sampled, as many at a time as fill such
    a batch with responses of full length: the fewer, the less is left to wait for."""
    states: Literal["model", "bfloat16"] = "model"
    """Precision of the hidden states that go to the learner. `model`: the very numbers that the teacher computed, two
    bytes each for a bfloat16 model and four for a float32 one. `bfloat16`: two bytes each, which is lossy for a float32
    model: its divergences are then those of states rounded to 8 significant bits; log-probs and entropies are taken
    before that."""
