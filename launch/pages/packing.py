"""Rollouts as the viewer's script reads them: pieces of text once, numbers of tokens as base64 of float32.

64 rollouts of 4,000 tokens have two million figures; as JSON numbers they would take 20 MB and be parsed before the
first of them is shown. Packed, a rollout's figures are decoded when it is first looked at. Must not know colours or
markup.

Invariant: NaN stands for what is not known, in every column.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from trace_rl.launch.pages.records import Candidates, Numbers, RolloutRecord, RouteRecord

Pieces = Callable[[Sequence[int]], Sequence[str]]
"""Token ids of a response -> the text that each of them has written."""


class PieceTable:
    """Every text of a token once; tokens refer to it by index."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def index(self, piece: str) -> int:
        """The number of a text, which is added where it is new."""
        return self._index.setdefault(piece, len(self._index))

    @property
    def pieces(self) -> list[str]:
        """In the order of their numbers. Lone surrogates, which no UTF-8 file can hold, are replaced."""
        return [piece.encode("utf-8", "replace").decode("utf-8") for piece in self._index]


def pack_rollout(record: RolloutRecord, pieces_of: Pieces, table: PieceTable) -> dict[str, Any]:
    """One rollout for the page."""
    count = len(record.token_ids)
    columns = {
        "advantage": record.token_advantages,
        "pgWeight": record.pg_weight,
        "rolloutLogprob": record.rollout_logprobs,
        "policyLogprob": record.policy_logprobs,
        "entropy": record.policy_entropy,
        "version": record.versions,
    }
    return {
        "sample": record.sample,
        "reward": record.reward,
        "cause": record.grade_cause,
        "finish": record.finish_reason,
        "advantage": record.advantage,
        "feedback": record.feedback,
        "annotation": record.annotation_cause,
        "reflection": record.reflection,
        "count": count,
        "tokens": _pack([table.index(piece) for piece in pieces_of(record.token_ids)], "<u4"),
        "columns": {name: _pack(_floats(values), "<f4") for name, values in columns.items() if len(values)},
        "spans": [[s.start, s.end, s.span_class, s.type, s.importance] for s in record.spans],
        "routes": [_pack_route(route, pieces_of, table) for route in record.routes],
    }


def _pack_route(route: RouteRecord, pieces_of: Pieces, table: PieceTable) -> dict[str, Any]:
    columns = {
        "weight": route.token_weights,
        "kl": route.divergence,
        "policyLogprob": route.policy_logprobs,
        "teacherLogprob": route.teacher_logprobs,
    }
    candidates = {"policy": route.policy_candidates, "teacher": route.teacher_candidates}
    return {
        "route": route.route,
        "weight": route.weight,
        "positions": _pack(route.positions, "<u4"),
        "columns": {name: _pack(_floats(values), "<f4") for name, values in columns.items() if len(values)},
        "candidates": {
            name: _pack_candidates(rows, pieces_of, table) for name, rows in candidates.items() if len(rows)
        },
    }


def _pack_candidates(rows: Candidates, pieces_of: Pieces, table: PieceTable) -> dict[str, Any]:
    """Rows of equal length end to end; each candidate is read alone, for it was never part of the text."""
    size = max(len(row) for row in rows)
    names = {token: table.index(_alone(token, pieces_of)) for row in rows for token, _ in row}
    padded = [[*row, *[(-1, None)] * (size - len(row))] for row in rows]
    none = table.index("")
    return {
        "size": size,
        "tokens": _pack([names.get(token, none) for row in padded for token, _ in row], "<u4"),
        "logprobs": _pack(_floats([value for row in padded for _, value in row]), "<f4"),
    }


def _alone(token: int, pieces_of: Pieces) -> str:
    return "".join(pieces_of([token]))


def _floats(values: Numbers | Iterable[float | None]) -> Float[np.ndarray, " row"]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float32)


def _pack(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()
