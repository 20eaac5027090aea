"""One vLLM engine, inside its actor: samples rollouts, answers chats, scores sequences and takes weights.

Decides how a vLLM output becomes a `Rollout`, and who gives way: a chat is served at once, beside rollouts that are
being sampled; new weights end it, unless rollouts run through syncs (`Scheduling.runs_through_syncs`). It must not know
rewards, routes, other engines, what chats are about, or how weights are transferred beyond the calls of vLLM's weight
transfer API.

Invariants: an engine takes rollouts only with weights that were proven (`accept`), and every token carries the version
of the weights that wrote it; no request reads prefixes that other weights have cached; token ids and log-probs are the
sampler's own, under the sampling distribution (after temperature, top-k and top-p); vLLM, and what describes its
weights, is touched in the thread of the engine only, so that every method may be called while others run.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from trace_rl.batch import Cancelled, Rollout, RolloutKey, RolloutRequest
from trace_rl.config.learner import Lora
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.config.scheduling import Scheduling
from trace_rl.errors import TraceError, WeightSyncError, WorkerError
from trace_rl.protocols import Decoding
from trace_rl.workers import life
from trace_rl.workers.adapters import Adapter
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatRequest
from trace_rl.workers.generator_chat import ChatFormat, chat_params
from trace_rl.workers.generator_llm import build_llm
from trace_rl.workers.generator_sampling import (
    prompt_logprobs,
    rollout_params,
    sampled_logprobs,
    scoring_params,
    token_versions,
)
from trace_rl.workers.generator_thread import Engine, EngineRequest, EngineThread
from trace_rl.workers.life import new_life
from trace_rl.workers.weight_wire import TransferBackend, TransferGroup, WeightManifest, transport_gist

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

CHAT_THREADS = 64
"""Chats that one engine serves at once."""
ENGINE_THREADS = CHAT_THREADS + 8
"""`max_concurrency` of an engine's actor that serves chats: they must not keep weights and rollouts waiting. Calls of
`generate` that are open through several steps come on top."""

# Priorities, lower goes first: a proof holds up every sync, a chat the step, an evaluation the learner.
_PROOF, _CHAT, _EVALUATION, _ROLLOUT = range(4)
_ADAPTER_ID = 1
_NO_ADAPTERS = Lora()
_SYNCHRONOUS = Scheduling()


@dataclass(frozen=True)
class WeightReceipt:
    """What an engine holds after an update, by its own account."""

    version: int
    digest: str


class GeneratorEngine:
    """One vLLM engine inside its actor: `ray.remote(GeneratorEngine).options(...).remote(...)`.

    Args:
        index: position among the engines; names this one in errors.
        model: `path` is a folder or hub name that vLLM can load.
        max_model_len: longest prompt plus completion, in tokens.
        backend: transport of the weights.
        seed: engine seed; samples depend on the requests' own seeds only.
        loaded_version: version to report for the weights on disk, for use without a learner: chats are answered
            whatever version they ask for, until a sync brings other weights. Without it nothing is generated until a
            weight sync has proven the weights.
        lora: the adapters that a weight sync brings; of rank 0: it brings all weights.
        scheduling: says what a weight sync does to requests that are being written.
        sleeps: whether it takes turns on its GPUs with a learner (`sleep`, `wake`).
    """

    def __init__(
        self,
        index: int,
        model: Model,
        settings: GeneratorSettings,
        max_model_len: int,
        backend: TransferBackend,
        seed: int = 0,
        loaded_version: int | None = None,
        lora: Lora = _NO_ADAPTERS,
        scheduling: Scheduling = _SYNCHRONOUS,
        sleeps: bool = False,
    ) -> None:
        self._name = f"generator engine {index}"
        self._backend: TransferBackend = backend
        self._adapter: LoRARequest | None = None
        self._adapter_folder: tempfile.TemporaryDirectory[str] | None = None
        self._proven_version = loaded_version
        self._is_as_loaded = loaded_version is not None
        self._scheduling = scheduling
        self._was_proven = False
        self._life = new_life()
        self._salt = "as loaded"

        def build() -> Engine:
            self._llm = build_llm(model, settings, max_model_len, backend, seed, lora, scheduling, sleeps)
            self._tokenizer = self._llm.get_tokenizer()
            if loaded_version is not None:
                self._llm.update_weight_version(str(loaded_version))
            return self._llm.llm_engine

        self._thread = EngineThread(self._name, build)
        self._chats = ChatFormat(self._name, self._tokenizer, model.chat_template_kwargs, max_model_len)
        life.begin(self._life)

    def ready(self) -> str:
        """The engine's name, once it can be used."""
        return self._name

    def life(self) -> str:
        """See `trace_rl.workers.revival`; its weights are unproven at the beginning of each."""
        return self._life

    def generate(
        self, requests: Sequence[RolloutRequest], decoding: Decoding, max_tokens: int
    ) -> Iterator[list[Rollout | Cancelled]]:
        """Sample one completion per request; yields those that finished in the same engine step.

        Log-probs are of the distribution that was sampled from: log_softmax of logits / temperature, of which top-k and
        then top-p have set the rest to -inf, so the mass of the tokens that are left is 1. With top_p=1 and top_k=0
        they are the model's own at that temperature; otherwise they lie above them.

        Raises:
            WeightSyncError: the weights of this engine are not proven.
            WorkerError: vLLM gave a request up.
        """
        begun_with: list[int] = []

        def make() -> list[EngineRequest]:
            if self._proven_version is None:
                raise WeightSyncError(
                    f"{self._name} was asked for rollouts while its weights are unproven; sync the weights first"
                )
            begun_with.append(self._proven_version)
            return [
                self._request(
                    request.prompt_token_ids,
                    rollout_params(request, decoding, max_tokens),
                    RolloutKey(request.prompt.prompt_id, request.sample),
                )
                for request in requests
            ]

        ticket = self._thread.submit(make, _EVALUATION if decoding.goes_first else _ROLLOUT)
        try:
            for finished in ticket.outputs():
                yield [self._outcome(requests[index], output, begun_with[0]) for index, output in finished]
        finally:
            ticket.abort()

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Give up completions that are being written; in their place `generate` yields `Cancelled`."""
        self._thread.cancel(keys)

    def _request(self, token_ids: tuple[int, ...], params: Any, tag: RolloutKey | None = None) -> EngineRequest:
        return EngineRequest(token_ids, params, self._salt, tag, self._adapter)

    def _outcome(self, request: RolloutRequest, output: Any, version: int) -> Rollout | Cancelled:
        if output is None:
            return Cancelled(RolloutKey(request.prompt.prompt_id, request.sample))
        return self._rollout(request, output.outputs[0], version)

    def _rollout(self, request: RolloutRequest, completion: Any, version: int) -> Rollout:
        if completion.finish_reason not in ("stop", "length"):
            raise WorkerError(
                f"{self._name} ended sample {request.sample} of prompt {request.prompt.prompt_id} with "
                f"{completion.finish_reason!r}, expected 'stop' or 'length'; see its log"
            )
        token_ids = tuple(completion.token_ids)
        versions = token_versions(completion.weight_versions, len(token_ids))
        if (versions < version).any() or (not self._scheduling.runs_through_syncs and (versions > version).any()):
            raise WeightSyncError(
                f"{self._name} wrote sample {request.sample} of prompt {request.prompt.prompt_id} with weight versions "
                f"{np.unique(versions).tolist()}, but version {version} was the proven one when it began"
            )
        return Rollout(
            prompt=request.prompt,
            sample=request.sample,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=token_ids,
            rollout_logprobs=sampled_logprobs(completion.logprobs, token_ids),
            finish_reason=completion.finish_reason,
            token_versions=versions,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
        )

    def complete(self, request: ChatRequest, timeout_s: float) -> ChatAnswer:
        """The answer to a chat, sampled beside the rollouts of `generate`, before those that wait for a place.

        Raises:
            ChatFault: `timeout`: not answered in time, or the weights are not (or no longer) those that the request
                asks for; `too_long`; `refused`: vLLM does not take it.
            WorkerError: the engine has failed in a step.
        """
        prompt = self._chats.prompt(request)
        ticket = self._thread.submit(lambda: [self._chat_request(request, prompt)], _CHAT)
        try:
            ((_, output),) = next(ticket.outputs(timeout_s))
        except TimeoutError as error:
            raise ChatFault(f"{self._name} did not answer a chat request within {timeout_s:g} s", "timeout") from error
        except TraceError:
            raise
        except Exception as error:  # of vLLM or its grammar compiler, on adding the request
            raise ChatFault(f"{self._name} does not take a chat request: {error}", "refused", is_final=True) from error
        finally:
            ticket.abort()
        return self._chats.answer(prompt, output.outputs[0])

    def _chat_request(self, request: ChatRequest, prompt: tuple[int, ...]) -> EngineRequest:
        runs_on = self._scheduling.runs_through_syncs and self._was_proven
        if not self._is_as_loaded and not runs_on and request.policy_version != self._proven_version:
            holds = "unproven weights" if self._proven_version is None else f"version {self._proven_version}"
            raise ChatFault(
                f"{self._name} holds {holds}, and the request is for version {request.policy_version}",
                "timeout",
                is_final=True,
            )
        return self._request(prompt, chat_params(request))

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]:
        """Log-probs of token sequences at temperature 1, computed anew (no cached prefix is read).

        Returns:
            One array [len(sequence) - 1] per sequence: element t is log p(sequence[t + 1] | sequence[: t + 1]).
        """
        ticket = self._thread.submit(
            lambda: [self._request(sequence, scoring_params()) for sequence in sequences], _PROOF
        )
        try:
            outputs = dict(itertools.chain.from_iterable(ticket.outputs()))
        finally:
            ticket.abort()
        return [prompt_logprobs(outputs[index], sequence) for index, sequence in enumerate(sequences)]

    def join_transfer(self, group: TransferGroup, rank: int) -> None:
        """Join the weight sender's group; leaves the one joined before. Raises WeightSyncError at the deadline."""
        from trace_rl.workers.weight_receiver import init_info

        info = {"init_info": init_info(self._backend, group, rank)}
        try:
            self._thread.run(lambda: self._llm.init_weight_transfer_engine(info))
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(
                f"{self._name} could not join the weight sender at {group.address}:{group.port} within "
                f"{group.timeout_s:g} s ({transport_gist(error)}); look at the learner's errors"
            ) from error

    def receive_weights(self, manifest: WeightManifest, version: int) -> WeightReceipt:
        """Take the sender's next weights as `version`; they stay unproven until `accept`. Chats give way.

        Raises:
            WeightSyncError: the sender was lost or late, vLLM could not load what came, or rollouts were still being
                sampled; names this engine.
        """
        return self._thread.run(lambda: self._receive(manifest, version))

    def _receive(self, manifest: WeightManifest, version: int) -> WeightReceipt:
        from trace_rl.workers.weight_receiver import update_info

        self._give_weights_up(version)
        try:
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": update_info(manifest)})
            self._llm.finish_weight_update(str(version))
        except TraceError as error:
            raise WeightSyncError(f"{self._name} at version {version}: {error}") from error
        except Exception as error:
            raise WeightSyncError(f"{self._name} could not load the weights of version {version}: {error!r}") from error
        self._forget_prefixes(version)
        return self.weight_receipt()

    def load_adapter(self, adapter: Adapter, version: int) -> WeightReceipt:
        """Take low-rank adapters in place of those before, as `version`; they stay unproven until `accept`.

        Chats give way, as for `receive_weights`.

        Raises:
            WeightSyncError: vLLM could not load them, or rollouts were still being sampled; names this engine.
        """
        return self._thread.run(lambda: self._load(adapter, version))

    def _load(self, adapter: Adapter, version: int) -> WeightReceipt:
        from vllm.lora.request import LoRARequest

        self._give_weights_up(version)
        if self._adapter_folder is None:
            self._adapter_folder = tempfile.TemporaryDirectory(prefix="adapter-")
        folder = Path(self._adapter_folder.name)
        adapter.write(folder)
        name = f"policy-{version}"
        try:
            # in place: vLLM would otherwise keep the adapter that it holds under this id
            is_loaded = self._llm.llm_engine.add_lora(LoRARequest(name, _ADAPTER_ID, str(folder), load_inplace=True))
        except Exception as error:
            raise WeightSyncError(
                f"{self._name} could not load the adapters of version {version}: {error!r}; if vLLM has none for this "
                "model, set learner.lora.sync=merged"
            ) from error
        if not is_loaded:
            raise WeightSyncError(f"{self._name} did not load the adapters of version {version}; see its log")
        self._adapter = LoRARequest(name, _ADAPTER_ID, str(folder))
        self._llm.update_weight_version(str(version))
        self._forget_prefixes(version)
        return WeightReceipt(int(self._llm.get_weight_version()), adapter.digest())

    def _give_weights_up(self, version: int) -> None:
        """End all chats, so that an annotation that comes late neither delays nor breaks a sync.

        Where rollouts run through syncs chats do so too.
        """
        self._proven_version = None
        self._is_as_loaded = False
        if self._scheduling.runs_through_syncs:
            return
        reason = f"{self._name} did not finish a chat request before the weights of version {version} replaced its own"
        self._thread.abort_all(_CHAT, ChatFault(reason, "timeout", is_final=True))

    def _forget_prefixes(self, version: int) -> None:
        """Let nothing that comes read what other weights have cached, nor what is being written unless it may."""
        self._salt = str(version)
        if self._scheduling.runs_through_syncs and self._scheduling.partial == "keep":
            return  # what is cached belongs to requests that are being written, and to no salt that is to come
        # requests that are being written are preempted: vLLM computes their cache anew before they go on
        if not self._llm.reset_prefix_cache(reset_running_requests=self._scheduling.runs_through_syncs):
            raise WeightSyncError(
                f"{self._name} kept its prefix cache after version {version} arrived, because requests still run; let "
                "them finish before a sync"
            )

    def weight_receipt(self) -> WeightReceipt:
        """Version and digest of the weights that were received last."""
        return self._thread.run(self._receipt)

    def _receipt(self) -> WeightReceipt:
        digests = self._llm.collective_rpc("received_digest")
        if len(set(digests)) != 1:
            raise WeightSyncError(
                f"the {len(digests)} workers of {self._name} received different weights (digests "
                f"{', '.join(sorted(set(digests)))}); stop the run and look at its log"
            )
        return WeightReceipt(int(self._llm.get_weight_version()), digests[0])

    def accept(self, version: int) -> str:
        """Declare the weights proven, so that rollouts may be sampled; returns the `life` in which they are."""

        def proven() -> None:
            self._proven_version, self._was_proven = version, True

        self._thread.run(proven)
        return self._life

    def sleep(self, level: int) -> None:
        """Give the GPUs up until `wake`; chats give way.

        Args:
            level: vLLM's. 1: the weights wait in CPU memory. 2: they are dropped, and the engine is unproven until
                others have come.

        Raises:
            WorkerError: rollouts were still being sampled; names this engine.
        """
        self._thread.run(lambda: self._sleep(level))

    def _sleep(self, level: int) -> None:
        if level > 1:
            self._proven_version = None
            self._is_as_loaded = False
        reason = f"{self._name} did not finish a chat request before the learner took its turn on the GPUs"
        self._thread.abort_all(_CHAT, ChatFault(reason, "timeout", is_final=True))
        if self._llm.llm_engine.has_unfinished_requests():
            raise WorkerError(f"{self._name} was put to sleep while it was sampling; let the rollouts finish before")
        self._llm.sleep(level)

    def wake(self, part: str) -> None:
        """Take memory of the GPUs back: that of the `weights`, then `kv_cache`; requests wait until both are there."""
        self._thread.run(lambda: self._llm.wake_up([part]))
