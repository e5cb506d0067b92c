"""Kills and requests to stop at random moments: a sample of `make kill`, which is the same with hundreds of moments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks


@pytest.mark.pulse
@pytest.mark.timeout(400)
def test_no_kill_and_no_stop_at_a_random_moment_costs_more_than_it_may(tmp_path: Path) -> None:
    """The control, a saver that writes in place, is killed while it writes, and must lose its run."""
    script, raw = ranks.ROOT / "benchmarks" / "kill.py", tmp_path / "raw.jsonl"
    amounts = ["--points", "12", "--control", "20", "--stops", "6"]  # a control is hit in one of four
    command = [sys.executable, str(script), *amounts, "--raw", str(raw), "--to", str(tmp_path / "table.md")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ranks.ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]  # the seed is in the first line
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    assert sum(row["what"] == "kill" for row in rows) == 12
    assert sum(row["what"] == "stop" for row in rows) >= 6
    assert any(row["problem"] for row in rows if row["what"] == "control")
