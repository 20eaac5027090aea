"""A tokenizer as the annotator's actor needs it: reads ids, counts text, names special tokens.

A fast tokenizer is reduced to its core, so that the actor imports neither transformers nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from trace_rl.segments import Detokenizer


class TokenReader(Detokenizer, Protocol):
    """A detokenizer that can count too."""

    def count(self, text: str) -> int:
        """Number of tokens of a text, special tokens in it read as such."""
        ...

    def special_tokens(self) -> Sequence[str]:
        """Texts that stand for one token each, whatever surrounds them."""
        ...


@dataclass(frozen=True)
class CoreReader:
    """The core of a fast tokenizer."""

    core: Tokenizer

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.core.id_to_token(token_id) for token_id in ids]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return str(self.core.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def count(self, text: str) -> int:
        return len(self.core.encode(text, add_special_tokens=False))

    def special_tokens(self) -> list[str]:
        return [token.content for token in self.core.get_added_tokens_decoder().values()]


@dataclass(frozen=True)
class WholeReader:
    """A tokenizer of transformers as it is."""

    tokenizer: Any

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return list(self.tokenizer.convert_ids_to_tokens(ids))

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return str(
            self.tokenizer.decode(
                token_ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )
        )

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def special_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values()]


def reader_of(tokenizer: Any) -> TokenReader:
    """The part of a Hugging Face tokenizer that is sent to the actor."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return CoreReader(core) if isinstance(core, Tokenizer) else WholeReader(tokenizer)
