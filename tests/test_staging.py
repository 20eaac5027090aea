"""What a job brings to a cluster, and which code it runs there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.launch.job import inside_job, own_code
from trace_rl.launch.job.staging import stage
from trace_rl.overlays import load_config

ROOT = Path(__file__).resolve().parents[1]


def configured(*overrides: str) -> RunConfig:
    return load_config([ROOT / "configs/demo.yaml"], ["run.folder=/shared/runs/{name}", *overrides])


def staged_in(folder: Path, working_folder: Path) -> Path:
    folder.mkdir()
    stage(configured(), working_folder, folder)
    return folder


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """`python -c code` away from the checkout, with these folders first on the module path."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], cwd="/", env=variables, capture_output=True, text=True)


def test_the_stage_holds_every_file_of_the_package_and_a_configuration_that_reads_back(tmp_path: Path) -> None:
    staged = staged_in(tmp_path / "stage", tmp_path)
    for checkout, name in [("trace", ""), ("workers", "workers"), ("launch", "launch"), ("configs", "configs")]:
        wanted = {
            path.relative_to(ROOT / checkout)
            for path in (ROOT / checkout).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        found = {path.relative_to(staged / "trace_rl" / name) for path in (staged / "trace_rl" / name).rglob("*")}
        assert wanted <= found, checkout
    assert load_config([staged / "config.yaml"]) == configured()


def test_the_staged_copy_hides_an_older_one_that_comes_first_on_the_path(tmp_path: Path) -> None:
    staged = staged_in(tmp_path / "stage", tmp_path)
    older = tmp_path / "image" / "trace_rl"
    (older / "launch").mkdir(parents=True)
    (older / "gone.py").write_text("", encoding="utf-8")  # a module that the newer version does not have
    done = python("import trace_rl; print(list(trace_rl.__path__)); import trace_rl.gone", older.parent, staged)
    assert done.stdout.strip() == f"['{staged / 'trace_rl'}']"
    assert "No module named 'trace_rl.gone'" in done.stderr


def test_the_job_calls_its_code_by_the_digest_that_the_submitter_was_told(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    told = stage(configured(), tmp_path, tmp_path / "stage").digest
    done = python("from trace_rl.launch.job import own_code; print(own_code.describe())", tmp_path / "stage")
    assert done.stdout.startswith(f"code {told} ("), done.stderr


def test_a_digest_follows_content_and_names_and_nothing_else(tmp_path: Path) -> None:
    def digest(folder: str, name: str, text: str) -> str:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return own_code.digest_of({name: path})

    first = digest("a", "x.py", "1\n")
    assert digest("b", "x.py", "1\n") == first
    assert digest("c", "x.py", "2\n") != first
    assert digest("d", "y.py", "1\n") != first


def test_two_merged_copies_are_refused_with_both_names(tmp_path: Path) -> None:
    copies = []
    for name in ("image", "submitted"):  # two namespace packages, as a wheel in the image and an unpacked one are
        staged = staged_in(tmp_path / name, tmp_path)
        (staged / "trace_rl" / "__init__.py").unlink()
        copies.append(staged)
    done = python("from trace_rl.launch.job import own_code; own_code.describe()", *copies)
    assert "ConfigError: trace_rl is merged from" in done.stderr
    assert all(str(copy / "trace_rl") in done.stderr for copy in copies)


def test_an_editable_install_and_an_installed_copy_are_one_copy_each(tmp_path: Path) -> None:
    floor, whole = tmp_path / "trace", tmp_path / "site-packages" / "trace_rl"
    (whole / "workers").mkdir(parents=True)
    hook = "__editable__.trace_rl-0.1.0.finder.__path_hook__"
    own_code.check_one_copy([str(floor), hook])
    own_code.check_one_copy([str(whole)])
    with pytest.raises(ConfigError, match="merged from 2 places"):
        own_code.check_one_copy([str(whole), hook])
    with pytest.raises(ConfigError, match="merged from 2 places"):
        own_code.check_one_copy([str(whole), str(tmp_path / "image" / "trace_rl")])


def test_plugins_of_the_working_folder_go_with_the_job_with_what_they_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    package = work / "our_actions"
    environment = work / ".venv" / "lib" / "our_installed"
    for folder in (package, environment):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("", encoding="utf-8")
    (package / "words.txt").write_text("data of the package", encoding="utf-8")
    (work / "our_helper.py").write_text("import our_installed\n", encoding="utf-8")
    (work / "our_plugin.py").write_text("import our_actions, our_helper\n", encoding="utf-8")
    (work / "our_notes.py").write_text("raise SystemExit('nobody imports this')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(work))
    monkeypatch.syspath_prepend(str(environment.parent))
    config = configured("plugins=[our_plugin]")
    (tmp_path / "stage").mkdir()
    staged = stage(config, work, tmp_path / "stage")
    assert staged.plugins == ("our_actions", "our_helper", "our_plugin")
    assert (staged.folder / "our_actions" / "words.txt").is_file()
    assert sorted(path.name for path in staged.folder.iterdir()) == [
        "config.yaml",
        "our_actions",
        "our_helper.py",
        "our_plugin.py",
        "trace_rl",
    ]


def test_a_relative_run_folder_is_refused_because_ray_would_remove_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.folder is 'runs/\{name\}'.*give an absolute path that all nodes share"
    ):
        stage(configured("run.folder=runs/{name}"), tmp_path, tmp_path)
    (tmp_path / "stage").mkdir()
    stage(configured("run.folder=~/runs"), tmp_path, tmp_path / "stage")  # the home folder is looked up by the job


def test_relative_paths_of_files_that_exist_here_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match=r"data\.heldout_path is 'rows\.jsonl', a relative path of this machine"):
        stage(configured("data.heldout_path=rows.jsonl"), tmp_path, tmp_path)
    (tmp_path / "stage").mkdir()
    stage(configured("model.path=Qwen/Qwen3-8B"), tmp_path, tmp_path / "stage")  # a name on the hub is no file here


def test_a_job_joins_its_own_cluster_unless_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert inside_job.settle(configured()).placement.ray_address == "local"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert inside_job.settle(configured()).placement.ray_address == "auto"
    given = configured("placement.ray_address=10.0.0.1:6379")
    assert inside_job.settle(given) == given
    with pytest.raises(ConfigError, match=r"a second Ray would be started beside it; set placement\.ray_address=auto"):
        inside_job.settle(configured("placement.ray_address=local"))
