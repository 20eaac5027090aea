"""What changes where this process is the driver of a job of a Ray cluster, however it was submitted.

The cluster that runs the job is the one that the roles belong on. So the default of placement.ray_address is `auto`
there; a second, private Ray beside it is never what a job is for, and is refused where the configuration asks for it.
"""

from __future__ import annotations

import os

from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the processes of a job's entry point


def settle(config: RunConfig) -> RunConfig:
    """The configuration as this process should run it.

    Raises:
        ConfigError: a job is told to start a Ray of its own.
    """
    if _JOB_VARIABLE not in os.environ:
        return config
    placement = config.placement
    if placement.ray_address != "local":
        return config
    if "ray_address" in placement.model_fields_set:
        raise ConfigError(
            "placement.ray_address is 'local', but this is a job of a Ray cluster, and a second Ray would be started "
            "beside it; set placement.ray_address=auto, or leave it out"
        )
    return config.model_copy(update={"placement": placement.model_copy(update={"ray_address": "auto"})})
