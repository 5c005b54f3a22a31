"""The comparison with an older commit: its floors, its ratios, and one run of the command on two equal services."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.against import NEW, OLD, Block, Effort, Pair, compare, in_turn, main, parse
from bench.against import _compared as compared
from bench.floors import MISSED, Line, Row, markdown, rows
from bench.load import Load, LoadError
from bench.servers import ROOT, interpreter
from tests.test_bench_serving import echo

ROW = Row("ppca", "encode", "octet-stream", "npy", 2, floor=0.5, aim=0.6)
FACTS = {"new_commit": "b", "old_commit": "a", "date": "today", "cpu": "a CPU", "cores": 2, "rounds": 3, "seconds": 0.5}
FACTS |= {"took_seconds": 60.0, "client_share": 0.5, "idle_share": 0.001}


def blocks(*rates):
    return [Block(rate, 0.001, 0.0001, 0.002) for rate in rates]


def test_floors_and_aims_are_those_of_the_issue():
    goals = {
        (row.verb, row.format, row.connections, row.images): (row.floor, row.aim)
        for row in rows("mnist")
        if row.model == "mnist"
    }
    assert goals == {
        ("encode", "octet-stream", 64, 1): (0.50, 0.65),
        ("encode", "octet-stream", 16, 1): (0.42, 0.55),
        ("encode", "octet-stream", 1, 1): (0.60, 0.80),
        ("encode", "png", 16, 1): (0.55, None),
        ("encode", "png", 1, 1): (0.55, None),
        ("encode", "json numbers", 16, 1): (0.55, None),
        ("encode", "json numbers", 1, 1): (0.55, None),
        ("score", "octet-stream", 1, 1): (0.90, 0.95),
        ("score", "octet-stream", 16, 1): (0.90, 0.95),
        ("score", "octet-stream", 64, 1): (0.90, 0.95),
        ("encode", "octet-stream", 4, 64): (0.88, 0.95),
        ("score", "octet-stream", 4, 64): (0.88, 0.95),
        ("encode", "octet-stream", 1, 64): (0.88, 0.95),
        ("score", "octet-stream", 1, 64): (0.88, 0.95),
    }
    others = {(row.model, row.floor) for row in rows("mnist") if row.model != "mnist"}
    assert others == {("big", 0.88), ("ppca", None)}
    assert {row.model for row in rows("mnist", with_big=False)} == {"mnist", "ppca"}


def test_a_ratio_is_the_median_of_the_rounds_and_not_that_of_the_medians():
    line = compared(ROW, 2, blocks(100, 200, 400), blocks(90, 40, 280))["line"]
    assert (line.least, line.value, line.most) == (0.2, 0.7, 0.9)
    assert line.old == "200/s, 1.00 ms CPU"


def test_a_floor_is_met_from_it_on_and_of_sizes_up_to_it():
    rate = Line("rate", 1, 0.5, 0.4, 0.6, "", "", floor=0.5, aim=0.6)
    assert rate.verdict == "met"
    assert replace(rate, value=0.6).verdict == "aim met"
    assert replace(rate, value=0.499).verdict == MISSED
    assert replace(rate, value=0.1, floor=None).verdict == ""
    size = replace(rate, floor=100.0, aim=None, fewer=True)
    assert replace(size, value=100.0).verdict == "met"
    assert replace(size, value=100.1).verdict == MISSED
    assert replace(size, value=float("nan")).verdict == MISSED  # where all was refused there is no latency


def test_the_table_says_how_many_floors_are_missed():
    met = Line("one", 1, 0.5, 0.4, 0.6, "2/s", "1/s", floor=0.5, aim=0.6)
    table = markdown([met, replace(met, name="two", value=0.3), replace(met, name="three", floor=None)], FACTS)
    assert f"`make bench-against BASE=<checkout of {FACTS['old_commit']}>`\n" in table
    assert "1 of 2 floors missed" in table
    assert "| one | 1 | 0.50 (0.40–0.60) | ≥ 0.50 | ≥ 0.60 | met | 2/s | 1/s |" in table
    assert "| two | 1 | 0.30 (0.40–0.60) | ≥ 0.50 | ≥ 0.60 | **missed** |" in table


def test_the_first_of_a_round_is_the_other_one_each_time():
    assert list(in_turn(3, "")) == [OLD, NEW, NEW, OLD, OLD, NEW]


class Fake:
    """A server that is at an address and takes CPU time whenever one asks."""

    def __init__(self, address):
        self.host, self.port = address
        self.spent = 0

    def cpu_seconds(self):
        self.spent += 1
        return self.spent


def test_services_that_answer_differently_are_not_compared(ppca_root, monkeypatch):
    with echo() as address:
        pair = Pair(ppca_root, 1, (Fake(address), Fake(address)), lambda *_: Load(2, 1.0))
        assert compare(pair, [ROW], Effort(0, 1, 1))[0]["line"].value == 1
        answers = iter([b"one", b"another"])
        monkeypatch.setattr("bench.against.ask", lambda *_: next(answers))
        with pytest.raises(LoadError, match="answer differently"):
            compare(pair, [ROW], Effort(0, 1, 1))


def test_a_block_counts_the_cpu_of_both_servers():
    busy, idle = Fake(("", 0)), Fake(("", 0))
    idle.cpu_seconds = iter([1.0, 1.5]).__next__
    pair = Pair(Path(), 1, (idle, busy), lambda *_: Load(requests=4, seconds=2.0, cpu=0.4), {ROW: b""})
    assert pair.block(ROW, NEW, 0) == Block(rate=2.0, server_cpu=0.25, client_cpu=0.1, idle=0.25)


def test_a_brief_run_leaves_the_big_model_out():
    brief, full = (parse(["--base", ".", *flags]) for flags in (["--brief"], []))
    assert (brief.big, full.big) == (False, True)
    assert brief.effort.seconds < full.effort.seconds
    assert full.workers[0] == 1
    assert parse(["--base", ".", "--rounds", "9"]).effort == replace(full.effort, rounds=9)
    with pytest.raises(SystemExit):
        parse(["--base", ".", "--only", "no such row"])


def test_an_interpreter_is_found_from_any_folder_and_stays_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/usr/bin/env")
    assert interpreter("bin/python") == str(tmp_path / "bin" / "python")
    assert interpreter("python3") == "python3"


def test_the_command_measures_every_row_and_writes_the_table(ppca_root, tmp_path, capsys):
    sides = ["--base", str(ROOT), "--repository", str(ppca_root), "--model", "ppca", "--workers", "1"]
    main([*sides, "--seconds", "0", "--rounds", "1", "--starts", "1", "--to", str(tmp_path)])
    (written,) = tmp_path.glob("against-*.md")
    assert written.read_text() in capsys.readouterr().out
    report = json.loads(written.with_suffix(".json").read_text())
    assert [result["line"]["name"] for result in report["rates"]] == [row.name for row in rows("ppca", with_big=False)]
    for result in [*report["rates"], *report["p99"], *report["memory"], *report["starts"]]:
        assert result["line"]["name"] in written.read_text()
        assert result["line"]["value"] > 0
    assert 0 < report["memory"][1]["new"] <= report["memory"][0]["line"]["value"] * 2
