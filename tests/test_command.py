"""The command `python -m bn_fast`: rows, JSON, exit status; a broken build cannot hide."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import bn_fast
from bn_fast import __main__ as command


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    kinds = [((32, 64),), ((2, 3, 4, 5), 3), ((9, 64), -1, "layer"), ((9, 64), -1, "rms")]
    kinds += [((3, 4, 5), 1, "group", 2), ((3, 4, 5), 1, "instance")]
    monkeypatch.setattr(command, "LAYERS", [command.Kind(*kind) for kind in kinds])
    for name in ("LAYER_SECONDS", "BLOCK_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(command, name, 0)
    monkeypatch.setattr(command, "find_torch", lambda: None)


def row_of(text, shown):
    return next(line for line in shown.splitlines() if text in line)


def test_all_is_well(capsys, tmp_path):
    assert command.main(["--json", str(tmp_path / "figures.json")]) == 0
    shown = capsys.readouterr().out
    assert bn_fast.__version__ in row_of("version", shown)
    assert "FAILED" not in shown
    for name, _ in command.CHECKS:
        assert row_of(name, shown).endswith("ok")
    assert "backward" in shown[shown.index("(2, 3, 4, 5) axis 3") :]
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["ok"]
    assert len(record["checks"]) == len(command.CHECKS)
    assert len(record["layers"]) == 2 * len(command.LAYERS)
    for layer in record["layers"]:
        assert set(layer["seconds"]) == {"bn_fast", "NumPy"}
        assert all(time > 0 for time in layer["seconds"].values())


def wrong_in_one_place(y):
    y = y.copy()
    y.flat[-1] += np.abs(y).max() * y.dtype.type(1e-5 if y.ndim > 1 else 3e-5)
    return y


def not_a_number(y):
    y = y.copy()
    y.flat[0] = np.nan
    return y


@pytest.mark.parametrize("spoil", [wrong_in_one_place, not_a_number])
@pytest.mark.parametrize(
    ("which", "result", "check", "layer"),
    [
        (f"{norm}norm_{way}", i, check, layer)
        for norm, check, layer in (
            ("batch", "float32 (4096, 33)", "(32, 64)"),
            ("layer", "layer norm, mean of", "layer (9, 64)"),
            ("rms", "rms norm", "rms (9, 64)"),
            ("group", "group norm", "group 2 (3, 4, 5)"),
            ("instance", "instance norm", "instance (3, 4, 5)"),
        )
        for way, n in (("forward", 1), ("backward", 2 if norm == "rms" else 3))
        for i in range(n)
    ],
)
def test_wrong_numbers_are_shown(capsys, monkeypatch, tmp_path, spoil, which, result, check, layer):
    right = getattr(bn_fast, which)

    def wrong(*args, **kwargs):
        results = list(right(*args, **kwargs))
        results[result] = spoil(results[result])
        return tuple(results)

    monkeypatch.setattr(bn_fast, which, wrong)
    named = [(name, function) for name, function in command.CHECKS if check in name]
    monkeypatch.setattr(command, "CHECKS", named)
    assert command.main(["--json", str(tmp_path / "figures.json")]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in row_of(check, shown)
    direction = which.partition("_")[2]
    assert row_of(f" {direction} ", shown[shown.index(layer) :]).endswith("FAILED")
    assert row_of("checks FAILED", shown)
    text = (tmp_path / "figures.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert not json.loads(text)["ok"]


def test_a_check_that_raises_has_failed_and_the_others_go_on(capsys, monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    (name, _), *others = command.CHECKS
    monkeypatch.setattr(command, "CHECKS", [(name, broken), *others[:1]])
    assert command.main([]) == 1
    shown = capsys.readouterr().out
    assert row_of(name, shown).endswith("FAILED RuntimeError: no such thing")
    assert row_of(others[0][0], shown).endswith("ok")


@pytest.mark.parametrize("name", ["missing/figures.json", ""])
def test_unwritable_json_is_said_at_once(capsys, tmp_path, name):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--json", str(tmp_path / name)])
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "bn_fast"],
        # What was still in the buffer when the reader left.
        ["-c", "import sys, bn_fast.__main__ as c; c.main = lambda: print(1); sys.exit(c.run())"],
    ],
    ids=["soon", "at the end"],
)
def test_a_reader_may_leave_before_the_end(arguments):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_an_interrupt_ends_it_without_a_traceback(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_checks", interrupt)
    monkeypatch.setattr(sys, "argv", ["bn_fast"])
    assert command.run() == 130
    assert "Traceback" not in capsys.readouterr().err
