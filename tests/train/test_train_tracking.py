"""metrics.jsonl, the screen and TensorBoard."""

import importlib.util
import io
import json
import logging
import math

import pytest

from hici.report.metrics import events_of, read_metrics, steps_of
from hici.train.console import ConsoleTable
from hici.train.recipe import recipe_from_dict
from hici.train.tracking import MetricsLog, TensorBoardLog, Trackers, check_tracking, make_trackers, start_event

RECIPE = {"model": "m", "data": ["d"], "output_dir": "o", "context_length": 8, "max_steps": 6}


def step(number, **changes):
    return {"step": number, "loss": 3.0 - number / 10, "hici_grad_norm": 0.5, "other_grad_norm": 2.0,
            "learning_rate": 2e-5, "hici_learning_rate": 2e-4, "tokens": 800, "tokens_per_second": 1600.0,
            "seconds": 0.5, "peak_memory_bytes": 3 * 2**30, **changes}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


@pytest.fixture
def log(path):
    log = MetricsLog(path)
    yield log
    log.close()


def test_entries_come_back_in_order(log, path):
    entries = [start_event(recipe_from_dict(RECIPE)), step(1), {"event": "checkpoint", "step": 1}, step(2, segments=4)]
    for entry in entries:
        (log.event if "event" in entry else log.step)(entry)
        assert read_metrics(path)[-1] == entry  # at once, not when the file is closed
    assert read_metrics(path) == entries
    assert steps_of(entries) == [entries[1], entries[3]]
    assert events_of(entries, "start", "end") == [entries[0]]


def test_a_killed_process_leaves_a_torn_line_that_is_cut(log, path, caplog):
    log.step(step(1))
    log.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(path) == [step(1)]
    assert "the last line is not whole (15 bytes)" in caplog.text
    again = MetricsLog(path)
    again.step(step(2))
    again.close()
    assert read_metrics(path) == [step(1), step(2)]
    assert path.read_text().count("\n") == 2


def test_a_last_line_that_lacks_only_its_newline_is_kept(log, path, caplog):
    log.close()
    path.write_text(json.dumps(step(1)))
    assert read_metrics(path) == [step(1)]
    again = MetricsLog(path)
    again.step(step(2))
    again.close()
    assert read_metrics(path) == [step(1), step(2)]
    assert not caplog.text


def test_resume_drops_what_is_beyond_the_checkpoint(log, path):
    uninterrupted = [step(i) for i in range(1, 7)]
    for entry in uninterrupted[:3]:
        log.step(entry)
    log.event({"event": "checkpoint", "step": 3})
    log.step(step(4, loss=9.0))
    log.event({"event": "heldout", "step": 4, "losses": {"full": 9.0}})
    assert log.truncate_after(3) == 2
    log.event({"event": "resume", "step": 3})
    for entry in uninterrupted[3:]:
        log.step(entry)
    entries = read_metrics(path)
    assert steps_of(entries) == uninterrupted
    assert [e["event"] for e in events_of(entries, "checkpoint", "heldout", "resume")] == ["checkpoint", "resume"]
    assert log.truncate_after(6) == 0
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


def test_a_step_twice_is_refused(log, path):
    log.step(step(1))
    log.step(step(2))
    with pytest.raises(ValueError, match=r"step 2 after step 2 in .*call truncate_after\(1\)"):
        log.step(step(2))
    log.close()
    with pytest.raises(ValueError, match="step 1 after step 2"):
        MetricsLog(path).step(step(1))
    log = MetricsLog(path)
    log.truncate_after(0)
    log.step(step(1))
    log.close()
    assert read_metrics(path) == [step(1)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_no_json_and_becomes_null(log, path, value, caplog):
    log.step(step(1, loss=value))
    log.event({"event": "heldout", "step": 1, "losses": {"full": value, "hici": 1.0}})
    entries = read_metrics(path)
    assert entries[0]["loss"] is None
    assert entries[1]["losses"] == {"full": None, "hici": 1.0}
    assert f"metrics.jsonl: loss is {value}" in caplog.text
    assert f"metrics.jsonl: losses: full is {value}" in caplog.text


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 has step None"),
        ('{"loss": 1.0}', "line 2 has step None"),
        ('{"step": "two"}', "line 2 has step 'two'"),
        ('{"step": -1}', "line 2 has step -1"),
        ('{"step": true}', "line 2 has step True"),
        ("", "line 2 is not JSON"),
        ("\0\0", "line 2 is not JSON"),
        ("\udcff", "line 2 is not JSON"),
    ],
)
def test_a_corrupt_line_is_named(path, line, problem):
    path.parent.mkdir()
    text = f"{json.dumps(step(1))}\n{line}\n{json.dumps(step(3))}\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for reading in (read_metrics, MetricsLog):
        with pytest.raises(ValueError, match=f"metrics.jsonl, {problem}.*take the line out, or restore the file"):
            reading(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_the_start_says_what_the_report_needs():
    start = start_event(recipe_from_dict({**RECIPE, "max_grad_norm": "inf"}))
    assert start["clips"] == {"hici": 0.3, "other": None}
    assert (start["method"], start["visibility"], start["total_steps"]) == ("hici", "all", 6)
    assert start["leaks_future"] == {"hici": True, "full": False}
    for changes in (
        {"hici": {"visibility": "past"}},
        {"method": "full"},
        {"method": "hici_s2"},
        {"hici": {"use_global": False, "use_local": False}},
    ):
        assert not any(start_event(recipe_from_dict({**RECIPE, **changes}))["leaks_future"].values()), changes


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal():
    lines, stream = [], io.StringIO()
    remarks = {"hici": "not causal: visibility all"}
    screen = ConsoleTable(100, 10, remarks=remarks, write=lines.append, stream=stream)
    screen.event({"event": "start", "step": 0, "method": "hici"})
    screen.event({"event": "heldout", "step": 0, "losses": {"hici": 4.25, "full": 4.0}})
    for i in range(1, 101):
        screen.step(step(i))
    screen.close()
    assert stream.getvalue() == ""
    assert lines.pop(0) == "method hici (not causal: visibility all)"
    assert lines[0] == ("step 0: held-out loss, nats a token: hici 4.2500 (not causal: visibility all), full 4.0000")
    assert lines[1].split("  ")[-1] == "peak memory"
    assert [line.split()[0] for line in lines[2:]] == ["1/100", *(f"{i}/100" for i in range(10, 101, 10))]
    assert lines[-1].split() == ["100/100", "-7.0000", "0.5", "2", "2.00e-04", "2.00e-05", "1,600", "3.00", "GiB"]
    assert len({len(line) for line in lines[1:]}) == 1  # a table: the columns are below one another
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_lines_go_to_the_log_by_themselves(caplog):
    caplog.set_level(logging.INFO, logger="hici")
    ConsoleTable(1, 1, stream=io.StringIO()).step(step(1))
    assert [record.name for record in caplog.records] == ["hici.train.console"] * 2
    assert "2.9000" in caplog.records[1].message


def test_a_column_only_for_what_is_there():
    lines = []
    screen = ConsoleTable(2, 1, write=lines.append, stream=io.StringIO())
    screen.step({"step": 1, "loss": 1.0, "segments": 8})
    screen.step({"step": 2, "loss": None})
    assert [line.split() for line in lines] == [
        ["step", "loss", "segments"],
        ["1/2", "1.0000", "8"],
        ["2/2", "-", "-"],
    ]


def test_a_terminal_has_a_bar_with_the_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")  # narrower than a line of the table
    stream = Terminal()
    screen = ConsoleTable(100, 10, first_step=40, stream=stream)
    for i in range(41, 61):
        screen.step(step(i))
    assert screen._bar.tasks[0].completed == 60
    assert screen._bar.tasks[0].time_remaining is not None
    screen.close()
    shown = stream.getvalue()
    assert "60/100" in shown.splitlines()[-2]  # then the cursor comes back
    assert any(line.rstrip().endswith("60/100  -3.0000        0.5           2   2.00e-04  2.00e-05      1,600     "
                                      "3.00 GiB") for line in shown.splitlines())  # fmt: skip


def test_nothing_without_progress():
    lines, stream = [], Terminal()
    screen = ConsoleTable(10, 1, progress=False, write=lines.append, stream=stream)
    screen.step(step(1))
    screen.event({"event": "end", "step": 1, "path": "p"})
    screen.close()
    assert (lines, stream.getvalue()) == ([], "")


def scalars(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(scalar.step, pytest.approx(scalar.value)) for scalar in events.Scalars(tag)]


def test_tensorboard_has_the_same_numbers_and_hides_what_was_done_again(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoardLog(tmp_path)
    for i in range(1, 5):
        board.step(step(i, segments=2))
    board.event({"event": "heldout", "step": 2, "losses": {"full": 1.5}})  # flushes; then the process is killed
    assert scalars(tmp_path, "train/loss") == [(i, step(i)["loss"]) for i in range(1, 5)]
    assert scalars(tmp_path, "train/segments") == [(i, 2) for i in range(1, 5)]
    assert scalars(tmp_path, "heldout/full") == [(2, 1.5)]
    board.close()
    again = TensorBoardLog(tmp_path, resumed_at=2)
    again.step(step(3, loss=7.0))
    again.close()
    assert scalars(tmp_path, "train/loss") == [(1, 2.9), (2, 2.8), (3, 7.0)]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    check_tracking(recipe_from_dict(RECIPE))
    with pytest.raises(ValueError, match=r"tensorboard=true needs the package tensorboard.*hici\[tracking\]"):
        check_tracking(recipe_from_dict({**RECIPE, "tensorboard": True}))


@pytest.mark.parametrize("board", [False, True])
def test_the_trackers_of_a_recipe(tmp_path, board):
    if board:
        pytest.importorskip("tensorboard")
    recipe, lines = recipe_from_dict({**RECIPE, "tensorboard": board, "logging_steps": 2}), []
    with make_trackers(recipe, tmp_path, write=lines.append) as trackers:
        trackers.event(start_event(recipe))
        for i in range(1, 5):
            trackers.step(step(i))
    assert lines[0] == "method hici (not causal: visibility all)"
    with pytest.raises(ValueError, match="metrics.jsonl exists, and a new run would go on with its curve.*--overwrite"):
        make_trackers(recipe, tmp_path)
    with make_trackers(recipe, tmp_path, resumed_at=2, write=lines.append) as trackers:
        trackers.event({"event": "resume", "step": 2})
        assert lines[-1] == "step 2: resume"
        for i in range(3, 7):
            trackers.step(step(i))
    assert [entry["step"] for entry in steps_of(read_metrics(tmp_path / "metrics.jsonl"))] == [1, 2, 3, 4, 5, 6]
    assert [line.split()[0] for line in lines if "/6" in line] == ["1/6", "2/6", "4/6", "3/6", "4/6", "6/6"]
    assert (tmp_path / "tensorboard").is_dir() == board
    if board:
        assert [number for number, _ in scalars(tmp_path / "tensorboard", "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_all_are_closed_when_one_fails():
    closed = []

    class Tracker:
        def __init__(self, name, fails):
            self.name, self.fails = name, fails

        def close(self):
            closed.append(self.name)
            if self.fails:
                raise OSError(f"{self.name}: no space left")

    with pytest.raises(OSError, match="a: no space left"):
        Trackers([Tracker("a", True), Tracker("b", False)]).close()
    assert closed == ["a", "b"]
