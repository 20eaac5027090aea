"""Where every actor of a run sits: which bundle of the cluster, what it takes of it, and whose GPUs it is shown.

Decides the layout from the configuration alone, and says what a set of nodes lacks for it; nothing is started or asked
here. Must not know Ray, engines or models.

Invariants:
* A run is one placement group, all or nothing; a bundle lies on one node, and a role has one bundle of its own unless
  it is a guest, or a learner rank that shares an engine's.
* A guest asks for no GPU: it is shown those of its hosts, which lie in the same bundle.
* Without GPUs the layout is the same, with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trace_rl.annotators import Frozen, SelfAnnotation, Static
from trace_rl.config.placement import Placement, Resources
from trace_rl.config.roles import GeneratorSettings
from trace_rl.config.run import RunConfig

REWARDER, ANNOTATOR, TEACHER = "the rewarder", "the annotator", "the teacher"
ENGINE_OF_ANNOTATOR, ENGINE_OF_TEACHER = "the engine of the annotator", "the engine of the teacher"
ENGINE_OF_POLICY = "the engine of the policy"
"""Of a policy that annotates without a run."""

_LEAST_CPUS = 0.001
"""Of a bundle whose roles ask for nothing: Ray refuses an empty one."""
_ROUNDING = 1e-6


def engine_role(index: int) -> str:
    """Name of an engine of the policy, as errors give it."""
    return f"generator engine {index}"


def rank_role(rank: int) -> str:
    """Name of a rank of the learner, as errors give it."""
    return f"learner rank {rank}"


@dataclass(frozen=True)
class Seat:
    """What one actor takes, and where."""

    role: str
    """Its name, as errors give it."""
    setting: str
    """The section that says what it takes, such as placement.teacher."""
    bundle: int
    num_cpus: float
    num_gpus: float
    """0 for a guest."""
    custom: Mapping[str, float]
    hosts: tuple[str, ...] = ()
    """Roles of the same bundle whose GPUs a guest is shown."""

    def demand(self) -> dict[str, float]:
        """By Ray's names; without what is 0."""
        return _positive({"CPU": self.num_cpus, "GPU": self.num_gpus, **self.custom})


@dataclass(frozen=True)
class PlacementPlan:
    """The layout of a run."""

    seats: Mapping[str, Seat]
    """By role."""
    bundles: tuple[Mapping[str, float], ...]
    """What each takes of one node, by Ray's names (CPU, GPU, custom ones)."""
    strategy: str
    """Ray's name of how bundles are laid over nodes."""

    def roles_of(self, bundle: int) -> list[str]:
        """Who sits in a bundle, hosts before guests."""
        return [seat.role for seat in self.seats.values() if seat.bundle == bundle]

    def uses_gpu(self, role: str) -> bool:
        """Whether it has a GPU, or is shown one."""
        seat = self.seats[role]
        return seat.num_gpus > 0 or any(self.uses_gpu(host) for host in seat.hosts)

    def total(self) -> dict[str, float]:
        """What the run takes of the whole cluster, by Ray's names."""
        return _sum(self.bundles)


@dataclass(frozen=True)
class Node:
    """What a node offers."""

    name: str
    """By which a user knows it, such as its address."""
    free: Mapping[str, float]
    """By Ray's names."""


def plan_placement(config: RunConfig) -> PlacementPlan:
    """The layout of a training run."""
    draft, roles, generator = _Draft(), config.placement, config.generator
    if roles.mode == "colocated":
        engine_hosts = _colocate(draft, config)
    else:
        engine_hosts = (engine_role(0),)
        for index in range(generator.num_engines):
            draft.seat(engine_role(index), "generator", roles.generator, workers=generator.tensor_parallel)
        for rank in range(config.learner.world_size):
            draft.seat(rank_role(rank), "learner", roles.learner)
    if config.needs_teacher:
        hosts = {"with_learner": (rank_role(config.learner.world_size - 1),), "with_generator": engine_hosts}
        draft.seat(TEACHER, "teacher", roles.teacher, hosts=hosts.get(roles.teacher_place, ()))
    draft.seat(REWARDER, "rewarder", roles.rewarder)
    if config.needs_annotator:
        _seat_annotator(draft, config)
    if config.sampling.source == "teacher":
        draft.seat(ENGINE_OF_TEACHER, "generator", roles.generator, workers=generator.tensor_parallel)
    return draft.plan(roles.strategy)


def plan_annotation(config: RunConfig) -> PlacementPlan:
    """The layout of an annotation of recorded rollouts, without a run."""
    draft = _Draft()
    _seat_annotator(draft, config)
    if isinstance(config.annotator.backend.model, SelfAnnotation):
        workers = config.generator.tensor_parallel
        draft.seat(ENGINE_OF_POLICY, "generator", config.placement.generator, workers=workers)
    return draft.plan(config.placement.strategy)


def plan_evaluation(generator: GeneratorSettings, placement: Placement) -> PlacementPlan:
    """The layout of an evaluation of checkpoints, without a run."""
    draft = _Draft()
    for index in range(generator.num_engines):
        draft.seat(engine_role(index), "generator", placement.generator, workers=generator.tensor_parallel)
    draft.seat(REWARDER, "rewarder", placement.rewarder)
    return draft.plan(placement.strategy)


def missing(plan: PlacementPlan, nodes: Sequence[Node]) -> list[str]:
    """What the nodes lack for the plan, each in one sentence; empty where all of it finds a place.

    Sentences of the first kinds found are given: a bundle that is larger than every node, then a sum that is larger
    than the cluster, then bundles that find no place beside the others, the largest being laid first.
    """
    if not nodes:
        return ["the cluster has no node that is alive; start one, or check placement.ray_address"]
    if plan.strategy == "STRICT_PACK":
        return _missing_on_one_node(plan, nodes)
    return _too_large(plan, nodes) or _too_many(plan, nodes) or _without_place(plan, nodes)


@dataclass
class _Draft:
    """A layout in the making."""

    seats: dict[str, Seat] = field(default_factory=dict)
    num_bundles: int = 0

    def seat(
        self, role: str, section: str, resources: Resources, hosts: tuple[str, ...] = (), workers: int = 1
    ) -> None:
        """Give a role a bundle of its own, or, as a guest, a place in that of its hosts."""
        if hosts:
            bundle = self.seats[hosts[0]].bundle
        else:
            bundle, self.num_bundles = self.num_bundles, self.num_bundles + 1
        self.join(role, section, resources, bundle, hosts, workers)

    def join(
        self,
        role: str,
        section: str,
        resources: Resources,
        bundle: int,
        hosts: tuple[str, ...] = (),
        workers: int = 1,
    ) -> None:
        """Give a role a place in a bundle."""
        self.seats[role] = Seat(
            role=role,
            setting=f"placement.{section}",
            bundle=bundle,
            num_cpus=resources.num_cpus * workers,
            num_gpus=0.0 if hosts else resources.num_gpus * workers,
            custom={name: amount * workers for name, amount in resources.custom.items()},
            hosts=hosts,
        )

    def plan(self, strategy: str) -> PlacementPlan:
        bundles = [
            _sum(seat.demand() for seat in self.seats.values() if seat.bundle == bundle)
            for bundle in range(self.num_bundles)
        ]
        return PlacementPlan(self.seats, tuple(bundle or {"CPU": _LEAST_CPUS} for bundle in bundles), strategy)


def _colocate(draft: _Draft, config: RunConfig) -> tuple[str, ...]:
    """Seat each engine with the ranks whose GPUs it shares; the hosts of the first engine."""
    shares = config.generator.tensor_parallel
    ranks = [rank_role(rank) for rank in range(config.learner.world_size)]
    for index in range(config.generator.num_engines):
        hosts = tuple(ranks[index * shares : (index + 1) * shares])
        draft.seat(hosts[0], "learner", config.placement.learner)
        bundle = draft.seats[hosts[0]].bundle
        for host in hosts[1:]:
            draft.join(host, "learner", config.placement.learner, bundle)
        draft.join(engine_role(index), "generator", config.placement.generator, bundle, hosts, shares)
    return tuple(ranks[:shares])


def _seat_annotator(draft: _Draft, config: RunConfig) -> None:
    draft.seat(ANNOTATOR, "annotator", config.placement.annotator)
    model = config.annotator.backend.model
    if isinstance(model, Static | Frozen):
        workers = model.engine.tensor_parallel
        draft.seat(ENGINE_OF_ANNOTATOR, "annotator_engine", config.placement.annotator_engine, workers=workers)


def _too_large(plan: PlacementPlan, nodes: Sequence[Node]) -> list[str]:
    """Bundles that no node could hold alone."""
    found = []
    for number, bundle in enumerate(plan.bundles):
        if any(_fits(bundle, node.free) for node in nodes):
            continue
        short = [name for name in bundle if not any(_fits({name: bundle[name]}, node.free) for node in nodes)]
        who = _names(plan.roles_of(number))
        if short:
            wanted = ", ".join(f"{_amount(bundle[name], name)} on one node" for name in short)
            most = ", ".join(_most(name, nodes) for name in short)
            found.append(f"{who} needs {wanted} ({_settings(plan, number, short)}), but {most}")
        else:
            found.append(
                f"{who} needs {_amounts(bundle)} on one node ({_settings(plan, number, list(bundle))}), and no node "
                f"has all of that: {_offers(nodes)}"
            )
    return found


def _too_many(plan: PlacementPlan, nodes: Sequence[Node]) -> list[str]:
    """Resources of which all bundles ask for more than all nodes have."""
    offered, found = _sum(node.free for node in nodes), []
    for name, wanted in plan.total().items():
        if wanted > offered.get(name, 0.0) + _ROUNDING:
            parts = [(seat.role, seat.demand().get(name, 0.0)) for seat in plan.seats.values()]
            who = ", ".join(f"{amount:g} for {role}" for role, amount in parts if amount)
            found.append(
                f"all roles together need {_amount(wanted, name)} ({who}), but the whole cluster has "
                f"{_amount(offered.get(name, 0.0), name)} free: {_most(name, nodes)}"
            )
    return found


def _without_place(plan: PlacementPlan, nodes: Sequence[Node]) -> list[str]:
    """Bundles that are left when the largest are laid first, each on the fullest node that still holds it."""
    left = [dict(node.free) for node in nodes]
    order = sorted(range(len(plan.bundles)), key=lambda number: _size(plan.bundles[number]), reverse=True)
    found = []
    for number in order:
        bundle = plan.bundles[number]
        holding = [free for free in left if _fits(bundle, free)]
        if holding:
            chosen = min(holding, key=_size)
            chosen.update({name: chosen[name] - amount for name, amount in bundle.items()})
        else:
            found.append(
                f"{_names(plan.roles_of(number))} needs {_amounts(bundle)} on one node "
                f"({_settings(plan, number, list(bundle))}), and no node has room for it beside the other roles: "
                f"{_offers(nodes)}"
            )
    return found


def _missing_on_one_node(plan: PlacementPlan, nodes: Sequence[Node]) -> list[str]:
    total = plan.total()
    if any(_fits(total, node.free) for node in nodes):
        return []
    return [
        f"placement.strategy is STRICT_PACK, so one node has to hold all roles, which need {_amounts(total)}, and none "
        f"has that: {_offers(nodes)}"
    ]


def _fits(demand: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(free.get(name, 0.0) >= amount - _ROUNDING for name, amount in demand.items())


def _size(amounts: Mapping[str, float]) -> tuple[float, float, float]:
    """Order of bundles and nodes: scarce resources first."""
    custom = sum(amount for name, amount in amounts.items() if name not in ("CPU", "GPU") and ":" not in name)
    return amounts.get("GPU", 0.0), custom, amounts.get("CPU", 0.0)


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _positive(amounts: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in amounts.items() if amount > 0}


def _amount(amount: float, name: str) -> str:
    return f"{amount:g} {name}"


def _amounts(demand: Mapping[str, float]) -> str:
    return " and ".join(_amount(amount, name) for name, amount in demand.items())


def _most(name: str, nodes: Sequence[Node]) -> str:
    best = max(nodes, key=lambda node: node.free.get(name, 0.0))
    return f"the node with most of it, {best.name}, has {_amount(best.free.get(name, 0.0), name)} free"


def _offers(nodes: Sequence[Node]) -> str:
    """What the largest nodes have."""
    largest = sorted(nodes, key=lambda node: _size(node.free), reverse=True)[:3]
    told = "; ".join(f"{node.name} has {_amounts(_plain(node.free))} free" for node in largest)
    return told if len(nodes) <= len(largest) else f"{told}; {len(nodes) - len(largest)} further nodes are smaller"


def _plain(free: Mapping[str, float]) -> dict[str, float]:
    """Without what Ray counts for itself: memory, and names of nodes."""
    known = {"CPU": free.get("CPU", 0.0), "GPU": free.get("GPU", 0.0)}
    is_own = ("memory", "object_store_memory")
    return known | {name: amount for name, amount in free.items() if ":" not in name and name not in (*known, *is_own)}


def _names(roles: Sequence[str]) -> str:
    return roles[0] if len(roles) == 1 else f"{', '.join(roles[:-1])} and {roles[-1]} together"


def _settings(plan: PlacementPlan, bundle: int, names: Sequence[str]) -> str:
    """The settings that ask for these resources."""
    keys = {"CPU": "num_cpus", "GPU": "num_gpus"}
    found = [
        f"{seat.setting}.{keys.get(name, f'custom.{name}')}"
        for seat in plan.seats.values()
        if seat.bundle == bundle
        for name in names
        if seat.demand().get(name)
    ]
    return ", ".join(dict.fromkeys(found))
