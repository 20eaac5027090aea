"""The seats of a run in a Ray cluster: taken together before any actor starts, or refused in one sentence.

Decides how long a cluster is waited for, and with which environment an actor starts in its seat. The layout is that of
`trace_rl.launch.placement`; this module must not know which roles there are.

Invariants: no actor is started outside of its bundle; what a private Ray cannot hold is refused at once, and a cluster
that grows, or whose resources others hold, is waited for at most placement.resources_timeout_s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trace_rl.config.placement import Placement
from trace_rl.errors import WorkerError
from trace_rl.launch.placement import Node, PlacementPlan, Seat, missing
from trace_rl.workers import environment
from trace_rl.workers.waiting import wait_for

logger = logging.getLogger(__name__)

_PATIENCE_S = 2.0
"""Before one is told that the cluster is waited for."""


@dataclass(frozen=True)
class Place:
    """A seat that is taken, and the environment of who sits there."""

    seat: Seat
    group: Any
    """Ray's placement group."""
    variables: Mapping[str, str]

    def options(self) -> dict[str, Any]:
        """For `.options(...)` of the actor's class."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.seat.num_cpus,
            "num_gpus": self.seat.num_gpus,
            "resources": dict(self.seat.custom),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.seat.bundle),
            "runtime_env": {"env_vars": dict(self.variables)},
        }


def actor_of(role: type, place: Place, **options: Any) -> Any:
    """A role's class as an actor class in its place; `.remote(...)` starts it."""
    import ray

    return ray.remote(role).options(**place.options(), **options)


@dataclass(frozen=True)
class Seats:
    """All seats of a run."""

    plan: PlacementPlan
    group: Any
    is_one_machine: bool
    """Whether all bundles lie on one machine, so that actors may talk over its loopback interface."""
    patience_s: float
    """How long a host may take to say which GPUs it has: it may have to start first."""
    signs: Callable[[str], Mapping[str, str]] = lambda role: {}
    """Environment by which a role gives signs of life."""

    def place(self, role: str, started: Mapping[str, Any]) -> Place:
        """The place of a role.

        Args:
            started: actor handles by role; those of a guest's hosts have to be among them.

        Raises:
            WorkerError: a host did not say which GPUs it has.
        """
        seat = self.plan.seats[role]
        gpus = None if seat.num_gpus else ",".join(self._gpus_of(host, started[host]) for host in seat.hosts)
        variables = environment.of_role(gpus and gpus.strip(","), self.is_one_machine, seat.num_cpus)
        return Place(seat, self.group, {**variables, **self.signs(role)})

    def give_back(self) -> None:
        """Let others have the seats; actors that are left end. The end of the driver does the same."""
        from ray.util import remove_placement_group

        remove_placement_group(self.group)

    def _gpus_of(self, role: str, actor: Any) -> str:
        """Ids of the GPUs that an actor sees, joined by commas."""
        return str(wait_for(actor.__ray_call__.remote(_visible_gpus), self.patience_s, role, "starting"))


def take_seats(plan: PlacementPlan, placement: Placement) -> Seats:
    """Take all bundles of the plan at once.

    Raises:
        WorkerError: the cluster has not got them, or not within placement.resources_timeout_s; names what is missing.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    is_private = placement.ray_address == "local"
    if is_private and (lacks := missing(plan, nodes())):
        raise WorkerError(_sentence(lacks, "this machine"))
    group = placement_group([dict(bundle) for bundle in plan.bundles], strategy=plan.strategy)
    timeout_s = placement.resources_timeout_s
    if not group.wait(min(_PATIENCE_S, timeout_s)):
        lacks = missing(plan, free_nodes())
        logger.warning("Waiting up to %g s for the resources of all roles: %s", timeout_s, "; ".join(lacks))
        if not group.wait(max(0.0, timeout_s - _PATIENCE_S)):
            lacks = missing(plan, free_nodes())
            remove_placement_group(group)
            where = f"the cluster at placement.ray_address={placement.ray_address}"
            raise WorkerError(_sentence(lacks, where, timeout_s))
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    of_bundles = ray.util.placement_group_table(group)["bundles_to_node_id"]
    is_one_machine = len({addresses[node] for node in of_bundles.values()}) == 1
    return Seats(plan, group, is_one_machine, placement.start_timeout_s)


def nodes() -> list[Node]:
    """What the nodes of the joined cluster have, whoever uses it."""
    import ray

    return [Node(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[Node]:
    """What the nodes of the joined cluster have that nobody uses."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeManagerAddress"], free.get(node["NodeID"], {})) for node in alive]


def _visible_gpus(actor: Any) -> str:
    """Runs inside an actor that is no guest: what Ray has given it."""
    import ray

    return ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])


def _sentence(lacks: list[str], where: str, timeout_s: float | None = None) -> str:
    waited = "" if timeout_s is None else f" within {timeout_s:g} s (placement.resources_timeout_s)"
    cause = "; ".join(lacks) or "what it has free now would do, so others may have used it meanwhile: try again"
    advice = "" if not lacks else "; ask for less, or add nodes"
    return f"{where} has not got the resources of all roles{waited}: {cause}{advice}"
