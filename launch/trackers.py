"""Optional sinks of metrics behind the run's own metrics.jsonl: TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from trace_rl.config.roles import Logging
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.protocols import Metrics

logger = logging.getLogger(__name__)

_FINISH_S = 60.0


class Tracker(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases; the key comes from its own environment variable or login, never from the configuration."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.run.name,
            dir=str(folder),
            config=config.model_dump(serialize_as_any=True, mode="json"),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is left, within bounds: a run must not hang because a server does."""
        finishing = threading.Thread(target=self._run.finish, daemon=True, name="wandb.finish")
        finishing.start()
        finishing.join(_FINISH_S)
        if finishing.is_alive():
            logger.warning(
                "Weights & Biases did not finish within %g s; `wandb sync` uploads the rest from the run folder",
                _FINISH_S,
            )


def check_installed(settings: Logging) -> None:
    """Refuse a tracker whose package is missing, before anything is written.

    Raises:
        ConfigError: naming the setting and the package.
    """
    wanted = {
        "logging.tensorboard": ("tensorboard", settings.tensorboard),
        "logging.wandb_project": ("wandb", settings.wandb_project is not None),
    }
    for setting, (package, is_on) in wanted.items():
        if is_on and find_spec(package) is None:
            raise ConfigError(f"{setting} is on, but the package {package} is not installed; pip install {package}")


def open_trackers(config: RunConfig, folder: Path) -> list[Tracker]:
    """The sinks that `logging` asks for."""
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard"))
    if config.logging.wandb_project is not None:
        trackers.append(WandbTracker(folder, config))
    return trackers
