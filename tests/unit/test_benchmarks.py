"""The benchmark command answers in the form that it promises. Nothing is timed here."""

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUN), *args], capture_output=True, text=True, timeout=100)


def test_a_group_is_measured_beside_its_floor() -> None:
    done = run("version", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    (figure,) = json.loads(done.stdout)["figures"]
    assert figure["name"] == "orch --version"
    assert figure["floor"] == "python -c pass"
    assert len(figure["samples"]) >= 5
    assert figure["value"] > 0
    assert figure["floor_ratio"] == figure["value"] / figure["floor_value"]
    assert isinstance(figure["noisy"], bool)


def test_an_unknown_group_is_named() -> None:
    done = run("speed")
    assert done.returncode == 2
    assert "no such group: speed" in done.stderr
