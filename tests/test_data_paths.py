"""What data, recorded files and names say leads to no file outside of the folders that belong to them."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value, load_from_disk
from pydantic import ValidationError

from trace_rl.config.evaluation import EvalConfig
from trace_rl.config.roles import Run
from trace_rl.errors import WeightSyncError
from trace_rl.launch.evaluate.subjects import find_subjects
from trace_rl.launch.saved_datasets import open_saved
from trace_rl.workers.weight_ipc import NodeMemory

ESCAPES = ["..", ".", "", "../up", "/etc/x", "a/b", "a\0b", "line\nfeed", "x" * 201, "\N{GREEK SMALL LETTER PI}" * 101]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_run_whose_name_leads_out_of_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"run\.name .* becomes the name of a folder"):
        Run(name=name)
    assert Run(name=name, folder="runs/fixed").name == name  # then it is no part of a path


def test_names_that_are_folders_are_taken() -> None:
    for name in ("run", "a b", "2026-01-01_trace+fkl.v2", "\N{GREEK SMALL LETTER PI}" * 100, "..."):
        assert Run(name=name).name == name


@pytest.mark.parametrize("name", ["..", ".", "../up", "/etc", "a" * 201])
def test_an_evaluation_set_whose_name_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="set name"):
        EvalConfig.model_validate({"sets": [{"name": name, "path": "task:arithmetic"}]})


def test_a_file_is_no_way_to_such_a_name() -> None:
    with pytest.raises(ValidationError, match=r"set name '\.\.' becomes"):
        EvalConfig.model_validate({"sets": "...jsonl"})  # its stem is ".."


def test_labels_of_evaluated_models_are_names_of_one_folder(tmp_path: Path) -> None:
    config = EvalConfig.model_validate({"sets": "arithmetic"})
    long = tmp_path / ("x" * 240)
    long.mkdir()
    (long / "config.json").write_text("{}")
    for path, label in (("org/some..model", "org--some..model"), (str(long), "x" * 150)):
        (subject,) = find_subjects([path], -1, config)
        assert subject.label == label


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/shm/../../etc/passwd", "/dev/shm/other", "weights-1", ""])
def test_a_worker_maps_no_file_but_a_bucket_of_weights(path: str) -> None:
    with pytest.raises(WeightSyncError, match=r"which is no bucket of /dev/shm; look at its log"):
        NodeMemory().open(f"8:{path}")


def test_buckets_of_weights_are_for_this_user_alone() -> None:
    memory = NodeMemory()
    lent, handle = memory.allocate(16)
    try:
        lent[:] = 3
        assert Path(handle.partition(":")[2]).stat().st_mode & 0o077 == 0
        assert memory.open(handle).tolist() == [3] * 16
    finally:
        memory.retire(handle)


def test_a_data_set_that_names_files_and_addresses_opens_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    named = [{"path": str(tmp_path / "secret"), "bytes": None}, {"path": "http://127.0.0.1:9/x.png", "bytes": None}]
    struct = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"question": Value("string"), "answer": Value("string"), "image": struct})
    rows = {"question": ["1 + 1?", "2 + 2?"], "answer": ["2", "4"], "image": named}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    info = tmp_path / "set" / "dataset_info.json"  # whoever hands over a data set writes this file too
    tree = json.loads(info.read_text())
    tree["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(tree))
    monkeypatch.setattr(Image, "decode_example", lambda self, value, **_: opened.append(value["path"]))
    list(load_from_disk(str(tmp_path / "set")))
    assert opened == [each["path"] for each in named]  # what reading all columns would do
    opened.clear()
    assert list(open_saved(tmp_path / "set", "train", "data.split", "a JSONL file")) == [
        {"question": "1 + 1?", "answer": "2"},
        {"question": "2 + 2?", "answer": "4"},
    ]
    assert opened == []
