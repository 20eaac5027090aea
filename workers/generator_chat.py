"""Chat requests as an engine serves them: how messages become a prompt, and a completion an answer.

This module must not know when requests run, or what they compete with.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trace_rl.prompts import ChatTokenizer, render
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatRequest

if TYPE_CHECKING:
    from vllm import SamplingParams

_SEED = 0


class ChatFormat:
    """Renders chats for one engine and reads its completions; may be called from several threads at once.

    Args:
        name: of the engine, for errors.
        tokenizer: of the engine; copied, because an engine's thread reads its own at the same time, and a tokenizer
            whose padding or truncation is changed while it is read raises.
        max_model_len: longest prompt plus answer, in tokens.
    """

    def __init__(
        self, name: str, tokenizer: ChatTokenizer, template_kwargs: Mapping[str, Any], max_model_len: int
    ) -> None:
        self._name = name
        self._tokenizer: Any = copy.deepcopy(tokenizer)
        self._template_kwargs = dict(template_kwargs)
        self._max_model_len = max_model_len
        self._lock = threading.Lock()

    def prompt(self, request: ChatRequest) -> tuple[int, ...]:
        """Token ids of the chat, ready for the assistant's turn.

        Raises:
            ChatFault: there is no room for it and its answer, or the chat template cannot render it.
        """
        messages = [message._asdict() for message in request.messages]
        try:
            with self._lock:
                prompt = render(self._tokenizer, messages, self._template_kwargs)
        except Exception as error:  # templates raise what they like
            raise ChatFault(
                f"the chat template of {self._name} cannot render the request ({error})", "refused", is_final=True
            ) from error
        if len(prompt) + request.max_tokens > self._max_model_len:
            raise ChatFault(
                f"the request has {len(prompt)} tokens and may be answered with {request.max_tokens}, but {self._name} "
                f"holds {self._max_model_len}; lower annotator.backend.max_prompt_tokens or max_reply_tokens",
                "too_long",
                is_final=True,
            )
        return prompt

    def answer(self, prompt: tuple[int, ...], completion: Any) -> ChatAnswer:
        """The answer in a finished `vllm.CompletionOutput`; an answer that reached max_tokens is cut off.

        Raises:
            ChatFault: vLLM gave the request up: the schema cannot be followed with this vocabulary.
        """
        if completion.finish_reason not in ("stop", "length"):
            raise ChatFault(
                f"{self._name} ended a chat request with {completion.finish_reason!r}: no token of its vocabulary "
                "continues the JSON that the schema asks for; see its log, and choose another annotator",
                "refused",
                is_final=True,
            )
        with self._lock:
            text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return ChatAnswer(text, len(prompt), len(completion.token_ids))


def chat_params(request: ChatRequest) -> SamplingParams:
    """How vLLM samples the answer: greedily at temperature 0, and always along the JSON schema."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        seed=_SEED,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(json=dict(request.schema)),
    )
