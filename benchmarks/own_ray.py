"""A private Ray for a benchmark. Import this before Ray: it sets the environment, which Ray reads once, at import."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from trace_rl.workers import environment

environment.apply()
environment.protect_private_ray()


@contextmanager
def private_ray() -> Iterator[None]:
    """Ray on this machine for the time of the block."""
    import ray

    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as folder:  # socket paths below it must stay short
        ray.init(
            address="local",
            num_cpus=4,  # so many workers start at a time
            object_store_memory=2**30,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()
