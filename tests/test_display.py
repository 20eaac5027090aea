"""What one sees: plain lines in a file or a pipe, a live bar on a terminal."""

import io

from rich.console import Console

from trace_rl.launch.display import Display

METRICS = {
    "reward/mean": 0.5,
    "loss/routed": 0.01234,
    "route/token_frac": 0.2,
    "policy/entropy_nats": 0.75,
    "response/length_mean_tokens": 31.25,
    "learner/grad_norm": 0.125,
    "mismatch/logprob_gap_max_nats": 1.2e-5,
    "time/step_s": 3.44,
    "something/else": 1.0,
}
HELDOUT = {
    "heldout/pass_at_1": 0.525,
    "heldout/samples": 512.0,
    "heldout/length_mean_tokens": 30.06,
    "heldout/truncated_frac": 0.015,
}


def shown(is_terminal: bool = False, width: int = 60) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=is_terminal, width=width, color_system=None), file


def test_a_step_is_one_plain_line_however_narrow_the_console() -> None:
    console, file = shown(width=20)
    with Display(console, num_steps=60) as display:
        display.stage("rollout")
        display.step(0, METRICS)
        display.step(59, {"reward/mean": 1.0})
    assert file.getvalue().splitlines() == [
        "step  1/60  reward 0.500  routed loss 0.0123  routed 20.0%  entropy 0.750  length 31.2  grad 0.125  "
        "gap 1.2e-05  time 3.4 s",
        "step 60/60  reward 1.000",
    ]


def test_an_evaluation_says_what_it_measured() -> None:
    console, file = shown()
    with Display(console, num_steps=60) as display:
        display.evaluation(20, HELDOUT)
    assert file.getvalue() == (
        "held-out after 20 steps: pass@1 52.5% of 512 samples, length 30.1 tokens, truncated 1.5%\n"
    )


def test_further_sets_stand_behind_the_held_out_ones() -> None:
    console, file = shown()
    with Display(console, num_steps=60) as display:
        display.evaluation(20, {**HELDOUT, "eval/longer/pass_at_1": 0.25, "eval/longer/samples": 512.0})
    assert file.getvalue().endswith("truncated 1.5%, longer 25.0%\n")


def test_notes_are_shown_as_they_are() -> None:
    # a path or message with brackets is text, not markup
    console, file = shown()
    with Display(console, num_steps=1) as display:
        display.note("resumed from runs/[red]demo[/red]/[1]")
    assert file.getvalue() == "resumed from runs/[red]demo[/red]/[1]\n"


def test_a_terminal_has_a_bar_with_the_stage_and_keeps_the_lines() -> None:
    console, file = shown(is_terminal=True, width=100)
    with Display(console, num_steps=8) as display:
        display.resume(3)
        display.stage("teacher")
        display.step(3, METRICS)
    text = file.getvalue()
    assert "teacher" in text
    assert "4/8" in text
    assert "reward 0.500" in text


def test_the_bar_ends_when_the_run_fails() -> None:
    console, _ = shown(is_terminal=True)
    display = Display(console, num_steps=8)
    try:
        with display:
            raise RuntimeError("broken")
    except RuntimeError:
        pass
    with Display(console, num_steps=8):  # rich refuses a second live display while one is running
        pass
