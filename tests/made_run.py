"""Run folders as drivers leave them, made by what writes real ones: lock, log, journal, ledger, checkpoints."""

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from file_role import make_checkpoints
from rich.console import Console

from trace_rl.config.run import RunConfig
from trace_rl.launch.display import Display
from trace_rl.launch.folder_lock import held
from trace_rl.launch.job import own_code
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.ledger import RunLedger
from trace_rl.launch.run_folder import open_run_folder, write_config
from trace_rl.launch.run_log import EARLY_END, logging_to
from trace_rl.launch.summary import Outcome, summarise_run

logger = logging.getLogger("trace_rl.launch.train")

CODE = own_code.describe()
STEP = {"reward/mean": 0.5, "reward/graded": 16.0, "reward/timeouts": 0.0, "reward/errors": 0.0}


class MadeRun:
    """One run, in the hands of one driver after the other; 2 prompts a step."""

    def __init__(self, root: Path, steps: int = 6, checkpoint_every: int = 2, **sections: Any) -> None:
        run = {"name": "demo", "folder": f"{root}/{{name}}", "steps": steps, "checkpoint_every": checkpoint_every}
        given = {"model": {"path": "m"}, "data": {"path": "d"}, **sections}
        self.config = RunConfig.model_validate({**given, "run": {**run, **sections.get("run", {})}})
        self.folder = open_run_folder(self.config)
        self.checkpoints, *_ = make_checkpoints(self.folder.path)
        self.ledger: Any = None

    @property
    def path(self) -> Path:
        return self.folder.path

    @contextmanager
    def driver(self, error: BaseException | None = None) -> Iterator[None]:
        """What `trace_rl.launch.train.run` does around a run.

        Args:
            error: ends the run, is noted, and does not leave the block.
        """
        with (
            held(self.folder.lock, "the run is being written", "wait"),
            logging_to(self.folder.log, Console(file=io.StringIO())),
        ):
            write_config(self.folder, self.config)
            logger.info(CODE)
            self.ledger = RunLedger(self.path)
            try:
                yield
                if error is not None:
                    raise error
            except BaseException as raised:
                logger.info("%s%s", EARLY_END, raised, exc_info=True)
                if raised is not error:
                    raise
            finally:
                self.ledger.close()

    def train(self, start: int, end: int, metrics: Mapping[str, float] = STEP, ends: bool = True) -> None:
        """Steps of a driver, as the loop notes them.

        Args:
            ends: whether the last step of the run ends it.
        """
        journal = RunJournal(self.folder, self.config.logging, Display(Console(file=io.StringIO()), 1), [])
        self.ledger.mark("resumed" if start else "started", start)
        for step in range(start, end):
            prompts = {f"drawn {step} {index}": f"task/{2 * step + index}" for index in range(2)}
            self.ledger.note("issued", step, prompts)
            with journal.stage("learner"):
                self.ledger.note("trained", step, prompts)
            journal._step_started_s = 100.0 + 10 * step  # a step every ten seconds
            journal.log_step(step, metrics)
            done = step + 1
            if done == self.config.run.steps or done % self.config.run.checkpoint_every == 0:
                self.checkpoints.save(done, {"index": 2 * done}, [])
                self.ledger.mark("checkpoint", done)
            if done == self.config.run.steps and ends:
                self.ledger.mark("ended", done)
                self.folder.summary.write_text(summarise_run(self.config, self.folder, Outcome([], 1.0, 1.0)))
