"""Measurements that stop and go on, in one process and in two, and what stands in their way."""

import json
import os
import re
import subprocess
import sys

import pytest

from hici.eval.measure import Plan, check_target, measure
from hici.eval.results import SCHEMA_VERSION, read_result
from hici.processes import only_run_in

PARTS = [f"part {i}" for i in range(7)]


class StoppedError(Exception):
    """Stands for a kill."""


def plan(stop_at=None, measured=None, **changes):
    def measure_part(name):
        if name == stop_at:
            raise StoppedError
        if measured is not None:
            measured.append(name)
        return {"length": len(name), "square": int(name[-1]) ** 2, "pair": (1, 2.5)}

    fields = {
        "task": "squares",
        "protocol": {"name": "test", "powers": [2]},
        "model": {"path": "m", "fingerprint": "sha256:1"},
        "data": None,
        "seed": 3,
        "parts": PARTS,
        "measure_part": measure_part,
        "summarise": lambda values: {"conditions": [{"name": name, **value} for name, value in values.items()]},
    }
    return Plan(**(fields | changes))


def without_time(result):
    return {key: value for key, value in result.items() if key != "provenance"}


@pytest.mark.parametrize("stop_at", PARTS)
def test_it_goes_on_where_it_stopped(stop_at, tmp_path):
    whole = measure(plan(), tmp_path / "whole.json")
    with pytest.raises(StoppedError):
        measure(plan(stop_at), tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
    measured = []
    result = measure(plan(measured=measured), tmp_path / "a.json")
    assert measured == PARTS[PARTS.index(stop_at) :]
    assert without_time(result) == without_time(whole)
    assert read_result(tmp_path / "a.json") == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "whole.json"]  # no journal, no lock


def test_a_torn_last_line_is_measured_again(tmp_path):
    with pytest.raises(StoppedError):
        measure(plan("part 4"), tmp_path / "a.json")
    journal = tmp_path / "a.partial-0.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[:-9])  # in the middle of part 3
    measured = []
    assert without_time(measure(plan(measured=measured), tmp_path / "a.json")) == without_time(measure(plan()))
    assert measured == PARTS[3:]
    journal.write_bytes(content[:20])  # not even the first line
    (tmp_path / "a.json").unlink()
    measured.clear()
    measure(plan(measured=measured), tmp_path / "a.json")
    assert measured == PARTS


def test_a_finished_measurement_is_taken_over(tmp_path, caplog):
    first = measure(plan(), tmp_path / "a.json")
    measured = []
    assert measure(plan(measured=measured), tmp_path / "a.json") == first
    assert measured == []
    assert "holds this very measurement already" in caplog.text
    measure(plan(measured=measured), tmp_path / "a.json", overwrite=True)
    assert measured == PARTS


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"protocol": {"name": "test", "powers": [3]}}, r"its protocol\.powers is \[2\], now \[3\]"),
        ({"model": {"path": "m", "fingerprint": "sha256:2"}}, r'its model\.fingerprint is "sha256:1", now "sha256:2"'),
        ({"seed": 4}, "its seed is 3, now 4"),
        ({"data": {"sha256": "x"}}, r"its data is null, now \{.sha256.: .x.\}"),
        ({"task": "cubes"}, 'its task is "squares", now "cubes"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_measurement_is_not_mixed_in(changes, told, tmp_path):
    with pytest.raises(StoppedError):
        measure(plan("part 2"), tmp_path / "a.json")
    measure(plan(), tmp_path / "b.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match=f"of another measurement: {told}; nothing is overwritten silently"):
            measure(plan(**changes), tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    measured = []
    measure(plan(measured=measured, **changes), tmp_path / "a.json", overwrite=True)
    assert measured == PARTS


def test_another_version_of_hici_is_another_measurement(tmp_path, monkeypatch):
    with pytest.raises(StoppedError):
        measure(plan("part 2"), tmp_path / "a.json")
    monkeypatch.setattr("hici.provenance.__version__", "9.9")
    with pytest.raises(ValueError, match=r'its provenance\.hici is ".*", now "9\.9"'):
        measure(plan(), tmp_path / "a.json")


def test_a_kill_behind_the_result_leaves_nothing_for_long(tmp_path):
    with pytest.raises(StoppedError):
        measure(plan("part 6"), tmp_path / "a.json")
    journal = tmp_path / "a.partial-0.jsonl"
    kept = journal.read_bytes()
    first = measure(plan(), tmp_path / "a.json")
    journal.write_bytes(kept)
    assert measure(plan(), tmp_path / "a.json") == first
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_files_of_others_are_not_touched(tmp_path):
    (tmp_path / "a.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"a\.json exists and is no result; nothing is overwritten silently"):
        measure(plan(), tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == '{"mine": 1}'
    (tmp_path / "b.partial-0.jsonl").write_text("not JSON\nat all\n")
    with pytest.raises(ValueError, match=r"b\.partial-0\.jsonl is damaged .*delete it, or give --overwrite"):
        measure(plan(), tmp_path / "b.json")


def test_a_damaged_journal_or_result_is_not_taken_over(tmp_path):
    with pytest.raises(StoppedError):
        measure(plan("part 2"), tmp_path / "a.json")
    journal = tmp_path / "a.partial-0.jsonl"
    journal.write_text("[1]\n" + journal.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"is damaged \(its first line is no object\); delete it, or give --overwrite"):
        measure(plan(), tmp_path / "a.json")
    result = measure(plan(), tmp_path / "b.json")
    del result["conditions"]
    (tmp_path / "b.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"b\.json lacks conditions, so it is damaged; .* \(--overwrite\)"):
        measure(plan(), tmp_path / "b.json")
    assert "conditions" in measure(plan(), tmp_path / "b.json", overwrite=True)


def test_neighbours_with_like_names_keep_their_journals(tmp_path):
    for name in ("ppl.json", "ppl-strict.json"):
        with pytest.raises(StoppedError):
            measure(plan("part 2"), tmp_path / name)
    measure(plan(), tmp_path / "ppl.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ppl-strict.partial-0.jsonl", "ppl.json"]


def test_an_output_in_use_is_refused(tmp_path):
    inner = []

    def busy(name):
        if not inner:
            with pytest.raises(ValueError, match="another run is writing into") as error:
                measure(plan(), tmp_path / "a.json")
            inner.append(str(error.value))
        return {}

    measure(plan(measure_part=busy), tmp_path / "a.json")
    assert inner


def test_every_process_is_told_what_the_first_one_has_found(tmp_path, monkeypatch):
    """Or they would wait, and end with an error of the network."""
    from hici.eval import measure as module

    said = []
    monkeypatch.setattr(module, "everyones", lambda value: said.append(value) or [value])
    with only_run_in(tmp_path, ".a.json.lock"), pytest.raises(ValueError, match="another run is writing into"):
        measure(plan(), tmp_path / "a.json")
    assert len(said) == 1
    assert "another run is writing into" in said[0]
    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "everyones", lambda value: [said[0], value])
    with pytest.raises(ValueError, match="another run is writing into"):
        measure(plan(), tmp_path / "b" / "a.json")
    assert not (tmp_path / "b").exists()


def test_nan_never_gets_into_a_result(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        measure(plan(measure_part=lambda name: {"loss": float("nan")}), tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


def test_progress_counts_what_was_done_before(tmp_path):
    with pytest.raises(StoppedError):
        measure(plan("part 3"), tmp_path / "a.json")
    seen = []
    measure(plan(), tmp_path / "a.json", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (4, 7), (5, 7), (6, 7), (7, 7)]


WORKER = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_eval_measure import PARTS, plan
from hici.eval.measure import measure
from hici.processes import end_processes, rank

measured = []
stop_at = sys.argv[3] if len(sys.argv) > 3 else None
def stop(name):
    if name == stop_at:
        os._exit(9)
    measured.append(name)
    return inner(name)
found = plan()
inner = found.measure_part
import dataclasses
result = measure(dataclasses.replace(found, measure_part=stop), sys.argv[1])
os.write(1, f"measured {rank()} {','.join(measured)} {len(result['conditions'])}\\n".encode())  # at once
end_processes()
"""


def two_processes(tmp_path, *arguments):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    command += map(str, arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_two_processes_share_the_parts_and_go_on_after_a_kill(tmp_path):
    here = os.path.dirname(__file__)
    target = tmp_path / "a.json"
    assert two_processes(tmp_path, target, here, "part 3").returncode != 0
    assert not target.exists()
    journals = sorted(tmp_path.glob("a.partial-*.jsonl"))
    kept = {json.loads(line)["part"] for path in journals for line in path.read_text().splitlines()[1:]}
    assert "part 1" in kept
    assert "part 3" not in kept
    done = two_processes(tmp_path, target, here)
    assert done.returncode == 0, done.stderr
    shares = {int(rank): set(filter(None, parts.split(","))) for rank, parts in
              re.findall(r"measured (\d) (.*?) 7", done.stdout)}  # fmt: skip
    assert set(shares) == {0, 1}, done.stdout
    assert shares[0] | shares[1] | kept == set(PARTS)
    assert not (shares[0] & shares[1]) | ((shares[0] | shares[1]) & kept)
    whole = measure(plan())
    assert read_result(target)["conditions"] == whole["conditions"]
    assert sorted(tmp_path.glob("a.*")) == [target]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": {"name": "hici-result", "version": SCHEMA_VERSION + 1}}, "schema version 2, and this hici reads"),
        ({"schema": {"name": "other"}}, "is no result"),
        ({"conditions": None}, "lacks a list of conditions, so it is damaged"),
    ],
)
def test_results_that_cannot_be_read(change, message, tmp_path):
    result = measure(plan(), tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(result | change))
    with pytest.raises(ValueError, match=message):
        read_result(tmp_path / "a.json")
    del result["data"]
    (tmp_path / "a.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="lacks data, so it is damaged"):
        read_result(tmp_path / "a.json")


def test_targets(tmp_path):
    assert check_target(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    with pytest.raises(ValueError, match=r"a\.txt does not end in \.json"):
        check_target(tmp_path / "a.txt")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ValueError, match=r"b\.json is a directory"):
        check_target(tmp_path / "b.json")
