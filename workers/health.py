"""What state a role is in, as a table: from what is heard of it, to what may be asked of it.

    healthy ---silent---> suspect ---mute---> quarantined ---back---> syncing ---proven---> healthy
       ^                     |                     |
       +--------beat---------+                     +----given_up---> dead

A role that has said nothing for a while is suspect, and still asked; one that is mute for longer is killed, as one that
hangs is no better than one that died. What died is quarantined until Ray has started it again, and an engine then syncs
until its weights are proven. Pure: must not know clocks, processes or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

State = Literal["healthy", "suspect", "quarantined", "syncing", "dead"]
Event = Literal["beat", "silent", "mute", "lost", "back", "proven", "given_up"]
"""`beat`: a sign of life; `silent`, `mute`: none for a while, for too long; `lost`: its process is gone; `back`: it has
begun another life; `proven`: it may be used; `given_up`: it is not started again."""

TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        ("healthy", "silent"): "suspect",
        ("healthy", "mute"): "suspect",  # never from one look alone: the one who looks may have been asleep
        ("healthy", "lost"): "quarantined",
        ("suspect", "beat"): "healthy",
        ("suspect", "mute"): "quarantined",
        ("suspect", "lost"): "quarantined",
        ("quarantined", "back"): "syncing",
        ("quarantined", "given_up"): "dead",
        ("syncing", "proven"): "healthy",
        ("syncing", "mute"): "quarantined",
        ("syncing", "lost"): "quarantined",
        ("syncing", "given_up"): "dead",
    }
)


def follow(state: State, event: Event) -> State:
    """The next state; what the table does not name changes nothing: a late beat of a former life, for example."""
    return TRANSITIONS.get((state, event), state)


def heard(silent_s: float, suspect_after_s: float, dead_after_s: float) -> Event:
    """The event that a silence of so many seconds is."""
    if silent_s > dead_after_s:
        return "mute"
    return "silent" if silent_s > suspect_after_s else "beat"
