"""The `trace-rl` command. Errors that a user can act on are printed as their sentence, without a stack."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trace_rl.launch.command_line import explained, is_override, prepare_imports
from trace_rl.launch.sweep.command import app as sweep_app
from trace_rl.workers import environment

if TYPE_CHECKING:
    from trace_rl.config.run import RunConfig

app = typer.Typer(
    help="Train language models with TRACE, GRPO and their relatives on Ray, vLLM and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arguments = Annotated[
    list[str],
    typer.Argument(metavar="FILE... [KEY=VALUE]...", help="YAML files, merged left to right, then dotted overrides."),
]
Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster's head node: http://HEAD:8265."),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as submit has printed it.")]

jobs_app = typer.Typer(help="Jobs of a Ray cluster: what became of them, what they print, how to end them.")
app.add_typer(jobs_app, name="jobs", no_args_is_help=True)
app.add_typer(sweep_app, name="sweep")


@app.command()
def train(
    arguments: Arguments,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a torch trace of the third step of each role that runs a model.")
    ] = False,
) -> None:
    """Train: trace-rl train configs/demo.yaml configs/methods/grpo.yaml run.steps=20"""
    console = Console()
    with explained("interrupted; run.resume=auto goes on from the last checkpoint"):
        config = _load([*arguments, *(["logging.profile_steps=[2]"] if profile else [])])
        from trace_rl.launch.job import inside_job

        config = inside_job.settle(config)
        _protect_ray(config)
        from trace_rl.launch.train import run

        run(config, console)


@app.command()
def plan(
    arguments: Arguments,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 where the cluster, or a GPU's memory, is too small.")
    ] = False,
    gpu_memory_gib: Annotated[
        float, typer.Option(min=0, help="Memory of a GPU; 0: that of this machine or, with --check, of the cluster.")
    ] = 0,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="Work out times for this GPU by its data sheet: H100, H200, A100-80G.")
    ] = "",
    roofs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Work out times from measured roofs, as `make bench` writes.")
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What a step will hold, such as response_tokens=900; see docs/cost.md."),
    ] = None,
) -> None:
    """Print what a run will do and take, and start nothing: trace-rl plan run.yaml --check"""
    with explained():
        config = _load(arguments)
        from trace_rl.launch.plan.command import Asked, show

        raise typer.Exit(show(config, Asked(check, gpu_memory_gib, gpu, roofs, tuple(expect or ())), Console()))


@app.command()
def submit(
    arguments: Arguments,
    address: Address = "",
    detach: Annotated[bool, typer.Option(help="Start the job, print its id and return.")] = False,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Pass this variable on; everyone may read it. No secrets.")
    ] = None,
    pip: Annotated[
        Path | None, typer.Option(metavar="LOCK", help="Install the packages of this lock; by default the image's.")
    ] = None,
) -> None:
    """Train on a running Ray cluster: trace-rl submit run.yaml run.folder=/shared/runs/{name} --address http://HEAD:8265"""
    with explained():
        config = _load([*arguments, "placement.ray_address=auto"])
        from trace_rl.launch.job.submit import Request
        from trace_rl.launch.job.submit import submit as start

        raise typer.Exit(start(config, Request(address, tuple(env or ()), pip, detach)))


@jobs_app.command("status")
def job_status(
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="One job; without it all of them.")] = "",
    address: Address = "",
) -> None:
    """Print state, run, code and folder."""
    with explained():
        from trace_rl.launch.job import jobs

        client = jobs.connect(address)
        for each in [jobs.details(client, job)] if job else jobs.all_jobs(client):
            typer.echo(jobs.describe(each))


@jobs_app.command("logs")
def job_logs(
    job: Job, address: Address = "", follow: Annotated[bool, typer.Option(help="Until it ends; its exit code.")] = False
) -> None:
    """Print what a job has printed."""
    with explained():
        from trace_rl.launch.job import jobs

        client = jobs.connect(address)
        if not follow:
            typer.echo(jobs.logs(client, job), nl=False)
            return
        from trace_rl.launch.job.submit import watch

        jobs.details(client, job)
        raise typer.Exit(watch(client, job, address))


@jobs_app.command("stop")
def stop_job(job: Job, address: Address = "") -> None:
    """End a job; its checkpoints stay."""
    with explained():
        from trace_rl.launch.job import jobs

        was_running = jobs.stop(jobs.connect(address), job)
        typer.echo(f"{job} is being stopped" if was_running else f"{job} was not running")


@app.command()
def template(name: Annotated[str, typer.Argument(help="slurm, kuberay-job or kuberay-cluster")]) -> None:
    """Print a file to start a cluster with: trace-rl template slurm > train.sbatch"""
    with explained():
        from trace_rl.launch.cluster_templates import read_template

        typer.echo(read_template(name), nl=False)


@app.command("config")
def show_config(arguments: Arguments) -> None:
    """Print the resolved configuration as YAML."""
    with explained():
        config = _load(arguments)
        from trace_rl.overlays import dump_config

        typer.echo(dump_config(config), nl=False)


@app.command()
def annotate(
    rollouts: Annotated[Path, typer.Argument(help="Run folder, its folder rollouts/, or one JSONL file of it.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [KEY=VALUE]...", help="As for train; by default the run's own config.yaml."),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="BACKEND", help="Another annotator.backend to compare with, as YAML.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Record the replies in a new file, for annotator.backend=replay.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Annotate so many rollouts at most; 0: all of them.")] = 0,
    estimate: Annotated[bool, typer.Option(help="Ask nothing; tell what a whole run would take.")] = False,
) -> None:
    """Annotate recorded rollouts: trace-rl annotate runs/demo annotator.backend=random --against oracle"""
    console = Console()
    with explained("interrupted; answers that models have given are stored, and are not asked for again"):
        files, overrides = split_arguments(arguments or [])
        given = [*map(str, files or [_config_beside(rollouts)]), *overrides]
        # nothing of the run's own backend goes into another one
        others = [[*given, "annotator.backend=", f"annotator.backend={other}"] for other in against or []]
        configs = [_load(each) for each in (given, *others)]
        _protect_ray(configs[0])
        from trace_rl.launch import annotate as offline

        recorded = offline.Recorded.read(rollouts, limit)
        if estimate:
            offline.print_cost(configs[0], recorded, console)
        else:
            offline.annotate(configs, recorded, out, console)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="Runs whose names begin so are one; else those that differ in seed only."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the page is written.")] = Path("report.html"),
) -> None:
    """Write one page on what runs have done: trace-rl report runs/trace-* runs/grpo-*"""
    with explained():
        from trace_rl.launch.pages.report import write_report

        written = write_report(runs, group or [], out)
        typer.echo(f"{written} shows {'1 run' if len(runs) == 1 else f'{len(runs)} runs'}; open it in a browser")


@app.command()
def view(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN2]", help="Folders of runs that keep rollouts.")],
    step: Annotated[
        list[int] | None,
        typer.Option(help="Steps to show; else the first and last of one run, the last of each of two."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the page is written.")] = Path("view.html"),
) -> None:
    """Write one page on what was done with each token: trace-rl view runs/demo --step 0 --step 90"""
    environment.apply()  # before transformers is imported
    with explained():
        from trace_rl.launch.pages.view import write_view

        typer.echo(f"{write_view(runs, step or [], out)} is written; open it in a browser")


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, alive or dead.")],
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte of a long ledger and a large checkpoint too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what became of a run, and how it goes on: trace-rl doctor runs/demo; exits with 1 where it needs someone."""
    environment.apply()  # before numpy is imported
    with explained():
        from trace_rl.launch.doctor.command import examine

        told, is_well = examine(run, full, as_json)
        typer.echo(told, nl=False)
        raise typer.Exit(not is_well)


@app.command("eval")
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT_OR_RUN... [FILE.yaml]... [KEY=VALUE]...",
            help="Checkpoint folders, run folders or hub names; YAML files and dotted overrides of the evaluation.",
        ),
    ],
    sets: Annotated[
        str, typer.Option(metavar="SET,...", help="AIME25, AIME25=aime25.jsonl, mine.jsonl, reasoning_gym:gcd, ...")
    ] = "",
    step: Annotated[int, typer.Option(min=-1, help="Of run folders; 0: the start, -1: the newest checkpoint.")] = -1,
) -> None:
    """Evaluate checkpoints on sets of problems: trace-rl eval runs/demo --sets arithmetic,arithmetic-longer"""
    console = Console()
    with explained("interrupted; samples that are finished are stored, and the same command goes on"):
        environment.apply()
        from trace_rl.launch.evaluate.arguments import read_arguments
        from trace_rl.overlays import dump_config
        from trace_rl.secrecy import refuse_secrets

        config, checkpoints = read_arguments(arguments, sets)
        refuse_secrets(dump_config(config), os.environ)
        if config.placement.ray_address == "local":
            environment.protect_private_ray()
        from trace_rl.launch.evaluate.command import evaluate as run

        run(config, checkpoints, step, console)


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """(files, overrides)."""
    overrides = [*filter(is_override, arguments)]
    return [Path(text) for text in arguments if text not in overrides], overrides


def _load(arguments: list[str]) -> RunConfig:
    prepare_imports()
    from trace_rl.overlays import dump_config, load_config
    from trace_rl.secrecy import refuse_secrets

    config = load_config(*split_arguments(arguments))
    refuse_secrets(dump_config(config), os.environ)
    return config


def _config_beside(rollouts: Path) -> Path:
    environment.apply()  # before numpy is imported
    from trace_rl.launch.rollout_dump import config_of

    return config_of(rollouts)


def _protect_ray(config: RunConfig) -> None:
    """Before Ray is imported; a cluster that is joined has a token of its own."""
    if config.placement.ray_address == "local":
        environment.protect_private_ray()


if __name__ == "__main__":
    app()
