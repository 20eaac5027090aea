"""The files in templates/ that start a cluster for trace-rl; each asks for a token from the start."""

from __future__ import annotations

from importlib import resources

from trace_rl.errors import ConfigError

TEMPLATES = {"slurm": "slurm.sbatch", "kuberay-job": "rayjob.yaml", "kuberay-cluster": "raycluster.yaml"}


def read_template(name: str) -> str:
    """Text of a template by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"there is no template {name!r}; expected one of {', '.join(TEMPLATES)}")
    return resources.files("trace_rl.launch").joinpath("templates", TEMPLATES[name]).read_text(encoding="utf-8")
