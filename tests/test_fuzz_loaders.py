"""Whatever loaders are given, they read it or refuse it in a few clear words; fuzzing finds what does neither."""

import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from trace_rl.errors import DataError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
fuzz = pytest.importorskip("fuzz")
fuzz_targets = pytest.importorskip("fuzz_targets")

EXAMPLES = 400


@pytest.mark.parametrize("name", list(fuzz_targets.TARGETS))
def test_any_input_is_read_or_refused(name: str) -> None:
    tally = fuzz.fuzz(fuzz_targets.TARGETS[name], EXAMPLES, first_seed=1)
    assert tally.unhandled == {}
    assert tally.num_inputs >= EXAMPLES
    assert tally.outcomes[fuzz_targets.ACCEPTED] > EXAMPLES / 50  # so that what comes after parsing is reached
    assert len(tally.outcomes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(fuzz_targets.TARGETS))
def test_many_inputs_are_read_or_refused(name: str) -> None:
    assert fuzz.fuzz(fuzz_targets.TARGETS[name], 5000, first_seed=1000).unhandled == {}


def test_a_reader_that_fails_is_found_with_its_input() -> None:
    def read(given: int, folder: Path) -> None:
        if given == 1:
            raise DataError("one is refused; give another number")
        if given == 2:
            raise DataError("x" * 5000)
        if given == 3:
            raise ZeroDivisionError

    target = fuzz_targets.Target(st.integers(0, 3), read)
    tally = fuzz.fuzz(target, 50, first_seed=0)
    assert set(tally.outcomes) == {"accepted", "DataError", "unhandled"}
    assert sorted(tally.unhandled.values()) == ["2", "3"]
    assert any(place.startswith("ZeroDivisionError at test_fuzz_loaders.py") for place in tally.unhandled)
    row = fuzz.to_row("numbers", tally, 1.0)
    assert row["inputs"] == row["accepted"] + row["refused"]["DataError"] + row["unhandled"] >= 50


def test_a_target_that_is_read_again_takes_the_place_of_its_row(tmp_path: Path) -> None:
    file = tmp_path / "fuzz.json"
    file.write_text('{"results": [{"target": "data", "inputs": 1}, {"target": "config", "inputs": 1}]}')
    assert fuzz.with_older([{"target": "config", "inputs": 2}], file) == [
        {"target": "config", "inputs": 2},
        {"target": "data", "inputs": 1},
    ]
    assert fuzz.with_older([{"target": "data", "inputs": 3}], None) == [{"target": "data", "inputs": 3}]
