"""Cells as jobs: submitted with an id that was noted before, followed, stopped, and taken up by a later sweep.

The cluster is a fake that keeps jobs as the Jobs API tells of them; the real one is in test_submit.py and
test_cluster.py."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, WorkerError
from trace_rl.launch.job.submit import Request
from trace_rl.launch.sweep import as_jobs
from trace_rl.launch.sweep.as_jobs import JobRunner
from trace_rl.launch.sweep.record import CellState, SweepRecord, read_states
from trace_rl.launch.sweep.schedule import SweepScheduler
from trace_rl.sweeps import Sweep, load_sweep

ADDRESS = "http://head:8265"
SWEEP = """\
name: s
folder: {folder}
address: http://head:8265
parallel: 2
base: {{overrides: {{model.path: m, data.path: d}}}}
axes: {{kind: {{type: list, variants: {{a: {{}}, b: {{}}, c: {{}}}}}}}}
"""


@dataclass
class Cluster:
    """Jobs that end when they have been asked after so often."""

    looks: dict[str, int] = field(default_factory=dict)
    """Group -> looks until its jobs end; by default the second one."""
    is_reachable: bool = True
    jobs: dict[str, JobStatus] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    most: int = 0
    """Jobs that ran at a time."""

    def ship(self, config: RunConfig, request: Request) -> None:
        assert config.placement.ray_address == "auto"
        assert request.job not in self.jobs
        self.jobs[request.job] = JobStatus.RUNNING
        self.most = max(self.most, list(self.jobs.values()).count(JobStatus.RUNNING))

    def connect(self, address: str) -> "Cluster":
        assert address == ADDRESS
        if not self.is_reachable:
            raise WorkerError("no Ray dashboard answers")
        return self

    def details(self, client: object, job: str) -> JobDetails:
        self.seen[job] = self.seen.get(job, 0) + 1
        if self.jobs[job] == JobStatus.RUNNING and self.seen[job] >= self.looks.get(job.partition("_")[0], 2):
            self.jobs[job] = JobStatus.FAILED if job.startswith("c_") else JobStatus.SUCCEEDED
        return self._told(job)

    def all_jobs(self, client: object) -> list[JobDetails]:
        return [self._told(job) for job in self.jobs]

    def stop(self, client: object, job: str) -> bool:
        self.jobs[job] = JobStatus.STOPPED
        return True

    def _told(self, job: str) -> JobDetails:
        code = 7 if self.jobs[job] == JobStatus.FAILED else None
        return JobDetails(
            type=JobType.SUBMISSION, submission_id=job, entrypoint="x", status=self.jobs[job], driver_exit_code=code
        )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(as_jobs, "ship", cluster.ship)
    for name in ("connect", "details", "all_jobs", "stop"):
        monkeypatch.setattr(as_jobs.jobs, name, getattr(cluster, name))
    return cluster


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(folder=tmp_path / "sweep"))
    (tmp_path / "sweep").mkdir()
    return load_sweep(tmp_path / "sweep.yaml")


def record_of(sweep: Sweep) -> SweepRecord:
    return SweepRecord(sweep.folder, lambda cell, kind, note: None)


def run(sweep: Sweep) -> None:
    SweepScheduler(sweep, record_of(sweep), JobRunner(ADDRESS, poll_s=0.001)).run()


def test_jobs_run_to_their_end_so_many_at_a_time_and_a_failure_is_told(sweep: Sweep, cluster: Cluster) -> None:
    run(sweep)
    states = read_states(sweep.folder)
    assert {name: state.status for name, state in states.items()} == {
        "a_seed-0": "finished",
        "b_seed-0": "finished",
        "c_seed-0": "failed",
    }
    assert "failed with exit code 7" in states["c_seed-0"].note
    assert (cluster.most, len(cluster.jobs)) == (2, 4)  # c was tried twice


def test_jobs_go_on_without_the_sweep_and_are_taken_up_again(sweep: Sweep, cluster: Cluster) -> None:
    record = record_of(sweep)
    cluster.jobs = {"a_seed-0-1": JobStatus.SUCCEEDED, "b_seed-0-1": JobStatus.RUNNING}
    for cell in ("a_seed-0", "b_seed-0"):
        record.note(cell, "started", f"job {cell}-1")
    record.note("c_seed-0", "started", "job c_seed-0-1")  # noted, and killed before it was submitted
    run(sweep)
    assert sorted(job.partition("_")[0] for job in cluster.jobs) == ["a", "b", "c", "c"]
    assert [read_states(sweep.folder)[cell.name].status for cell in sweep.cells] == ["finished", "finished", "failed"]


def test_an_interrupted_sweep_stops_its_jobs(sweep: Sweep, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.looks = {"a": 1000, "b": 1000}
    details = cluster.details
    presses = iter([KeyboardInterrupt])

    def interrupted_at_the_sixth_look(client: object, job: str) -> JobDetails:
        if sum(cluster.seen.values()) == 6:
            for press in presses:
                raise press
        return details(client, job)

    monkeypatch.setattr(as_jobs.jobs, "details", interrupted_at_the_sixth_look)
    with pytest.raises(KeyboardInterrupt):
        run(sweep)
    assert JobStatus.RUNNING not in cluster.jobs.values()
    assert read_states(sweep.folder)["b_seed-0"] == CellState("waiting", "by the user")


def test_a_dashboard_out_of_reach_is_waited_for_within_bounds(
    sweep: Sweep, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.jobs["a_seed-0-1"] = JobStatus.RUNNING
    running = as_jobs.JobCell(ADDRESS, "a_seed-0-1")
    cluster.is_reachable = False
    assert running.ended() is None
    monkeypatch.setattr(as_jobs, "_PATIENCE_S", -1.0)
    with pytest.raises(WorkerError, match="no Ray dashboard answers"):
        running.ended()


def test_a_cell_of_this_machine_is_no_job(sweep: Sweep, cluster: Cluster) -> None:
    record_of(sweep).note("a_seed-0", "started", "process 12 1.0")
    with pytest.raises(ConfigError, match="was started on a machine"):
        run(sweep)
