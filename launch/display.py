"""What one sees while a run goes on: a live bar and one line a step on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from trace_rl.protocols import Metrics

_COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("routed loss", "loss/routed", "{:.4f}"),
    ("routed", "route/token_frac", "{:.1%}"),
    ("entropy", "policy/entropy_nats", "{:.3f}"),
    ("length", "response/length_mean_tokens", "{:.1f}"),
    ("grad", "learner/grad_norm", "{:.3f}"),
    ("gap", "mismatch/logprob_gap_max_nats", "{:.1e}"),
    ("time", "time/step_s", "{:.1f} s"),
)


class Display:
    """Progress of one run; a context manager that owns the live bar."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=num_steps)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def resume(self, step: int) -> None:
        """Count the steps that a resumed run has behind it."""
        self._progress.update(self._task, completed=step)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(text)

    def stage(self, name: str) -> None:
        """What the run is busy with now; shown on a terminal only."""
        self._progress.update(self._task, description=name)

    def step(self, step: int, metrics: Metrics) -> None:
        cells = [f"{label} {form.format(metrics[name])}" for label, name, form in _COLUMNS if name in metrics]
        width = len(str(self._num_steps))
        self.note(f"step {step + 1:>{width}}/{self._num_steps}  " + "  ".join(cells))
        self._progress.update(self._task, completed=step + 1)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        line = Text(f"held-out after {step} steps: pass@1 {metrics['heldout/pass_at_1']:.1%}", style="bold")
        line.append(
            f" of {metrics['heldout/samples']:.0f} samples, length {metrics['heldout/length_mean_tokens']:.1f} tokens, "
            f"truncated {metrics['heldout/truncated_frac']:.1%}",
            style="not bold",
        )
        for name, value in metrics.items():
            if name.startswith("eval/") and name.endswith("/pass_at_1"):
                line.append(f", {name.split('/')[1]} {value:.1%}")
        self._print(line)

    def _print(self, line: str | Text) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
