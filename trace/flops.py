"""Floating point operations of a forward pass: what work a step took and what it was spared, whatever ran it.

Must not know models, devices or layouts: padding is no work here, and kernels that compute more than they need are not
charged for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerShape:
    """What the cost of a dense decoder with full causal attention depends on."""

    num_layer_parameters: int
    """All but the token embedding and the output head."""
    num_layers: int
    attention_width: int
    """Query heads times the size of a head."""
    hidden: int
    """Entries of the state that the output head reads."""
    vocab: int
    """Rows of the output head."""
    num_read_parameters: int = 0
    """Of the layers', those of the last one that only tokens whose states are read go through; 0 where all do."""

    def forward_flops(self, length: float, num_head_rows: float) -> float:
        """Operations of one sequence through the layers, and of some of its states through the output head.

        F = 2 P T + 2 L W T^2 + 2 d V R for T tokens, R rows, P parameters of L layers, attention width W, state size d
        and vocabulary V. A multiplication and an addition are two operations. Scores and values of the attention take
        2 W T^2 each in every layer, of which a causal mask leaves half.

        References: Chowdhery et al. 2022, arXiv:2204.02311, appendix B (2 N + 4 L W T a token, embedding left out);
        Dao 2023, arXiv:2307.08691, section 4.1 (half of it under a causal mask).
        """
        layers = 2 * self.num_layer_parameters * length
        attention = 2 * self.num_layers * self.attention_width * length**2
        head = 2 * self.hidden * self.vocab * num_head_rows
        return layers + attention + head

    def spared_flops(self, num_unread: float) -> float:
        """Operations in `forward_flops` that the last layer does not do for tokens whose states nobody reads."""
        return 2 * self.num_read_parameters * num_unread


@dataclass(frozen=True)
class TeacherCost:
    """What the work of a teacher depends on, beside its requests."""

    shapes: tuple[TransformerShape, ...] = ()
    """Of the models that every request runs through; none without a teacher."""
    shared_within: int = 0
    """Tokens of a batch in which a prompt that several requests have is computed once; 0: each computes its own."""
