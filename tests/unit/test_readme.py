"""README.md tells the truth: its commands are CI's, its example loads, its links lead somewhere."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_as_it_is_written() -> None:
    (command,) = (text.strip() for text in snippets("bash") if "pytest" in text)
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert command in lines
    install = command.rsplit(" && ", 1)[0]
    assert install in lines, "what CI lints must be installed as the README says"


def test_the_commands_are_on_the_first_screen() -> None:
    head = "\n".join(README.splitlines()[:24])
    assert "orch run --local" in head
    assert "-m pytest" in head


def test_the_extras_that_are_installed_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        name for text in snippets("bash") for group in re.findall(r"\[([a-z,]+)\]'", text) for name in group.split(",")
    }
    assert named == {"studio", "dev"}
    assert named <= set(project["optional-dependencies"])


def test_the_example_is_short_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import orch

    (source,) = snippets("python")
    assert len(source.strip().splitlines()) <= 25
    assert {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)} == {"orch"}
    (tmp_path / "readme_app.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    try:
        module = importlib.import_module("readme_app")
    finally:
        sys.modules.pop("readme_app", None)
    apps = [value for value in vars(module).values() if isinstance(value, orch.App)]
    assert len(apps) == 1


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_relative_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


def test_machines_elsewhere_get_what_the_studio_needs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        line for line in extras["studio"] if not line.startswith("orch")
    ]
