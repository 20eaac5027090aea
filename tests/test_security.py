"""What the code may not call: whatever runs, unpickles or opens to others what it was given.

Every call of the floors and the benchmarks is looked at. What is forbidden, and the few places where it is right, with
the reason, are two tables here: a new place has to be written down to pass.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trace", "workers", "launch", "benchmarks")

FORBIDDEN = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "makes code of text",
    "__import__": "imports by a name that is not in the source",
    "importlib.import_module": "imports by a name that is not in the source",
    "pickle.load": "a pickle runs whatever it says",
    "pickle.loads": "a pickle runs whatever it says",
    "cloudpickle.load": "a pickle runs whatever it says",
    "cloudpickle.loads": "a pickle runs whatever it says",
    "ray.cloudpickle.loads": "a pickle runs whatever it says",
    "marshal.loads": "crashes on what it is given",
    "shelve.open": "keeps pickles",
    "numpy.load": "reads pickles where allow_pickle says so",
    "pandas.read_pickle": "a pickle runs whatever it says",
    "joblib.load": "a pickle runs whatever it says",
    "torch.load": "a pickle runs whatever it says, unless weights_only=True",
    "torch.jit.load": "runs code of the file",
    "torch.hub.load": "downloads code and runs it",
    "yaml.load": "makes any object, unless its loader is a safe one",
    "yaml.unsafe_load": "makes any object",
    "yaml.full_load": "makes many kinds of objects",
    "os.system": "a shell reads names as commands",
    "os.popen": "a shell reads names as commands",
    "subprocess.getoutput": "a shell reads names as commands",
    "subprocess.getstatusoutput": "a shell reads names as commands",
    "subprocess.run": "starts another program",
    "subprocess.call": "starts another program",
    "subprocess.check_call": "starts another program",
    "subprocess.check_output": "starts another program",
    "subprocess.Popen": "starts another program",
    "os.execv": "starts another program",
    "os.execvp": "starts another program",
    "os.spawnv": "starts another program",
    "tempfile.mktemp": "another user may take the name first",
    "os.chmod": "may open a file to others",
    ".chmod": "may open a file to others",
    "os.umask": "may open all files to others",
    "shutil.unpack_archive": "an archive may name files outside of its folder",
    ".extractall": "an archive may name files outside of its folder",
    "sympy.sympify": "evaluates text",
    "sympy.parse_expr": "evaluates text",
    "ssl._create_unverified_context": "believes any server",
}

ALLOWED = {
    ("trace/overlays.py", "importlib.import_module"): "modules that the configuration names under plugins: its author",
    ("launch/job/own_code.py", "importlib.import_module"): "the floors of this package, by a list in the source",
    ("benchmarks/peers.py", "importlib.import_module"): "libraries that are compared, by names in the source",
    ("benchmarks/gpu_cases.py", "importlib.import_module"): "sections of the GPU check, by names in the source",
    ("trace/yaml_files.py", "yaml.load"): "its loader is a SafeLoader that refuses more",
    ("launch/doctor/evidence.py", "yaml.load"): "its loader is a SafeLoader",
    ("workers/grading.py", "subprocess.Popen"): "a child of this interpreter that grades, without a shell",
    ("launch/sweep/local.py", "subprocess.Popen"): "a cell of a sweep, without a shell; its argument is a file of ours",
    ("launch/plan/cluster.py", "subprocess.run"): "nvidia-smi with constant arguments",
    ("launch/arithmetic_base.py", ".chmod"): "the model that is shipped is for every user of the machine",
    ("benchmarks/annotation_overlap.py", "subprocess.Popen"): "this interpreter and a script of benchmarks/",
    ("benchmarks/annotation_overlap.py", "subprocess.run"): "this interpreter and trace-rl",
    ("benchmarks/bench.py", "subprocess.run"): "this interpreter and a script of benchmarks/",
    ("benchmarks/report.py", "subprocess.run"): "git, of this working tree",
    ("benchmarks/gpu_check.py", "subprocess.run"): "nvidia-smi with constant arguments",
    ("benchmarks/race.py", "subprocess.Popen"): "another Python and a script of benchmarks/",
    ("benchmarks/launched_run.py", "subprocess.Popen"): "this interpreter and trace-rl",
}
"""(file, call) -> why it is right there."""


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call by the full name of what is called, as far as imports tell; `.name` for methods of anything else."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                names[each.asname or each.name.partition(".")[0]] = (
                    each.name if each.asname else each.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield _called(node.func, names), node


def _called(function: ast.expr, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.insert(0, function.attr)
        function = function.value
    if isinstance(function, ast.Name) and (not parts or function.id in names):
        return ".".join([names.get(function.id, function.id), *parts])
    return f".{parts[-1]}" if parts else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def violations(file: str, source: str) -> list[str]:
    """What is wrong with a file, one line for each."""
    found = []
    for name, call in calls(source):
        short = f".{name.rpartition('.')[2]}"
        rule = name if name in FORBIDDEN else short if short in FORBIDDEN else ""
        if rule == "torch.load" and is_constant(keyword(call, "weights_only"), True):
            continue
        if rule and (file, rule) not in ALLOWED:
            found.append(f"{file}:{call.lineno}: {rule} {FORBIDDEN[rule]}")
        shell = keyword(call, "shell")
        if shell is not None and not is_constant(shell, False):
            found.append(f"{file}:{call.lineno}: shell= reads names as commands")
        for setting in ("trust_remote_code", "allow_pickle"):
            given = keyword(call, setting)
            if isinstance(given, ast.Constant) and given.value:
                found.append(f"{file}:{call.lineno}: {setting}=True, which only a configuration may say")
        host = keyword(call, "host")
        if is_constant(host, "0.0.0.0") or (name == "ray.init" and keyword(call, "dashboard_host") is not None):
            found.append(f"{file}:{call.lineno}: listens on more than loopback")
    return found


def is_constant(value: ast.expr | None, wanted: object) -> bool:
    return isinstance(value, ast.Constant) and value.value == wanted


def sources() -> list[tuple[str, str]]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return [(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def test_no_file_calls_what_is_forbidden() -> None:
    assert len(sources()) > 150  # all floors are looked at
    assert [line for file, source in sources() for line in violations(file, source)] == []


def test_every_exception_is_still_needed() -> None:
    made = {(file, name) for file, source in sources() for name, _ in calls(source)}
    made |= {(file, f".{name.rpartition('.')[2]}") for file, name in made}
    assert [place for place in ALLOWED if place not in made] == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "import pickle as p\np.loads(data)",
        "from pickle import loads\nloads(data)",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "from torch import load as read\nread(file)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import subprocess\nsubprocess.run(words)",
        "anything(words, shell=True)",
        "anything(words, shell=flag)",
        "import os\nos.system(words)",
        "file.chmod(0o777)",
        "Path(name).joinpath('a').chmod(0o777)",
        "import tempfile\ntempfile.mktemp()",
        "archive.extractall()",
        "load(path, trust_remote_code=True)",
        "serve(host='0.0.0.0')",
        "from sympy.parsing.sympy_parser import parse_expr\nimport sympy\nsympy.sympify(text)",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert violations("trace/some.py", source)


def test_what_is_safe_is_left_alone() -> None:
    source = """
import ast, json, re, torch, yaml
re.compile(pattern)
model.eval()
torch.load(file, weights_only=True)
yaml.safe_load(text)
ast.literal_eval(text)
load(path, trust_remote_code=model.trust_remote_code)
run(words, shell=False)
"""
    assert violations("trace/some.py", source) == []
