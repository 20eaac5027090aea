"""What the words of the responses tell: talk of context that the student never saw, and expressed doubt.

Both are early signs of a student that imitates a privileged teacher instead of reasoning: it cites a solution that is
not there (the leakage of arXiv:2604.03128; how that paper counts it is not known to us, so the patterns are ours), and
it stops voicing doubt (the epistemic verbalization of arXiv:2603.24472, whose list of words is used).

The counts are of wordings, not of meaning. Some of these wordings also occur by chance, so a value says little alone:
compare it with the first steps of the run, or with a run without a teacher.

This module must not know which teacher context a run uses. Every function is defined for any text, and its time is
linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trace_rl.batch import GradedRollout


def _phrase(pattern: str) -> re.Pattern[str]:
    """A pattern of whole words in any case, where a space stands for any white space."""
    return re.compile(r"\b(?:" + pattern.replace(" ", r"\s+") + r")\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Leak:
    """One kind of privileged context in words."""

    mention: re.Pattern[str]
    explained_by: re.Pattern[str]
    """A question with this in it may be answered in such words, so none of the kind is counted."""


_REFERENCE = _phrase(
    r"(?:reference|provided|given|supplied|official|ground\Wtruth) (?:solution|answer)s?\b"
    r"(?! (?:choice|option|format|set))"
    r"|(?:according to|as (?:given|shown|stated) in) the (?:solution|answer|reference)"
    r"|answer key"
)
_CARE = _phrase("tak(?:e|ing) care with")
_HINT = _phrase("(?:the|your) (?:(?:given|provided|above) )?hints?")
# "my previous attempt" is the student on its own response
_ATTEMPT = _phrase(r"(?<!\bmy\s)(?<!\bour\s)(?:previous|earlier|prior) attempts?")
_FEEDBACK = _phrase("(?:according to|based on|from) the feedback|(?:given|provided|environment) feedback")
_LEAKS = (
    _Leak(mention=_REFERENCE, explained_by=_REFERENCE),
    _Leak(mention=_CARE, explained_by=_CARE),
    _Leak(mention=_HINT, explained_by=_phrase("hints?")),
    _Leak(mention=_ATTEMPT, explained_by=_phrase("attempts?")),
    _Leak(mention=_FEEDBACK, explained_by=_phrase("feedback")),
)

_HINTING = (
    r"(?:tak(?:e|ing)\s+care\s+with(?:\s*:)?"
    r"|(?:hints?|labels?|(?:error|mistake|diagnostic)\s+types?)(?:\s+(?:is|are|was)\b|\s*[:=]))"
    r"\s*[\"'`*(\[]{0,3}"
)
"""Words directly before a label that show it to be one."""

_EPISTEMIC = _phrase("wait|hmm+|perhaps|maybe|actually|alternatively|seems|might|likely|check")
"""The ten words that arXiv:2603.24472 counts (its code finds them inside of longer words too)."""


def leaks(text: str, question: str, types: Collection[str]) -> int:
    """Number of times a response mentions privileged context that the student never saw.

    Counted, each as whole words in any case:

    * a reference: "reference | provided | given | supplied | official | ground-truth solution | answer", "answer key",
      "according to | as given | shown | stated in the solution | answer | reference";
    * a hint: "the | your (given | provided | above) hint", and "take care with", the wording in which teachers are
      given types by default;
    * an earlier response: "previous | earlier | prior attempt" unless "my" or "our" stands before it;
    * feedback: "according to | based on | from the feedback", "given | provided | environment feedback";
    * a type label of the run, underscores read as spaces. A label of one word ("format", "final") is mostly an ordinary
      word; it counts only directly behind wording that shows it to be a label: "take care with", or "hint",
      "label", "error | mistake | diagnostic type" with "is", "are", "was", ":" or "=".

    A question that speaks of such things itself explains an answer in the same words: a kind is not counted where the
    question mentions it ("hint", "attempt" and "feedback" in any wording), nor a label that the question contains.

    Args:
        question: what the student was asked.
        types: the type labels that a teacher of the run may be given.
    """
    count = sum(_count(leak.mention, text) for leak in _LEAKS if not leak.explained_by.search(question))
    labels = [words for words in map(_words, types) if words and not _any_of([words]).search(question)]
    several, single = [words for words in labels if len(words) > 1], [words for words in labels if len(words) == 1]
    parts = [f"(?:{_HINTING})?{_any_of(several).pattern}"] if several else []
    parts += [_HINTING + _any_of(single).pattern] if single else []
    return count + (_count(re.compile(rf"(?<!\w)(?:{'|'.join(parts)})", re.IGNORECASE), text) if parts else 0)


def epistemic_markers(text: str) -> int:
    """Number of words that express doubt.

    These are wait, hmm, perhaps, maybe, actually, alternatively, seems, might, likely and check, in any case and as
    whole words, so that "unlikely" and "checkerboard" do not count.

    Reference: arXiv:2603.24472.
    """
    return _count(_EPISTEMIC, text)


def text_metrics(rollouts: Sequence[GradedRollout], types: Collection[str]) -> dict[str, float]:
    """Leaks a rollout, share of rollouts that leak, and epistemic markers per 1000 response tokens; 0 without rollouts.

    Args:
        types: as for `leaks`.
    """
    counts = [leaks(item.rollout.text, item.rollout.prompt.question, types) for item in rollouts]
    markers = sum(epistemic_markers(item.rollout.text) for item in rollouts)
    tokens = sum(len(item.rollout.token_ids) for item in rollouts)
    return {
        "response/leaks_per_rollout": sum(counts) / max(len(counts), 1),
        "response/leaking_rollouts_frac": sum(count > 0 for count in counts) / max(len(counts), 1),
        "response/epistemic_markers_per_1k_tokens": 1000 * markers / max(tokens, 1),
    }


def _words(label: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", label) if word]


def _any_of(labels: Sequence[Sequence[str]]) -> re.Pattern[str]:
    """Any of the labels as whole words; white space, underscores or hyphens join the words of one."""
    choices = "|".join(r"[\s_-]+".join(map(re.escape, words)) for words in labels)
    return re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))
