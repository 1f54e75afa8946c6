"""What `import orch` promises: the names, and that it stays light."""

import importlib
import json
import subprocess
import sys

import pytest

NAMES = """
    App AppState BuildConfig Call CloudCompute Delete Dict Drive Flow Get List Post Put ScriptWork ServiceWork Stage
    StaticFrontend StreamlitFrontend Work
""".split()
HEAVY = ["uvicorn", "fastapi", "streamlit", "gradio", "torch", "ray", "boto3"]
PACKAGES = ["orch", "orch_workers", "orch_drive", "orch_ui"]


def isolated(code: str) -> str:
    """Output of a Python of its own."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_contract_is_there(name: str) -> None:
    import orch

    assert name in orch.__all__
    assert getattr(orch, name) is not None


def test_the_test_kit_for_users_is_there() -> None:
    from orch.testing import AppTester

    assert callable(AppTester)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_true(package: str) -> None:
    module = importlib.import_module(package)
    names = list(getattr(module, "__all__", []))
    assert names == sorted(names, key=lambda name: (name.lower(), name)) or names == sorted(names)
    for name in names:
        getattr(module, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import orch

    with pytest.raises(AttributeError, match="NoSuchThing"):
        orch.NoSuchThing  # noqa: B018


def test_importing_orch_loads_nothing_heavy() -> None:
    loaded = json.loads(isolated("import json, sys, orch; print(json.dumps([m.split('.')[0] for m in sys.modules]))"))
    assert set(HEAVY) & set(loaded) == set()


def test_declaring_an_app_loads_nothing_heavy() -> None:
    code = """
import json, sys
from orch import App, CloudCompute, Drive, Flow, List, ScriptWork, ServiceWork, StreamlitFrontend, Work

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.x = 1
        self.train = ScriptWork("python train.py", outputs=["models"], cloud_compute=CloudCompute("gpu"))
        self.serve = ServiceWork("python serve.py --port {port}")

app = App(Root())
print(json.dumps([m.split('.')[0] for m in sys.modules]))
"""
    assert set(HEAVY) & set(json.loads(isolated(code))) == set()


def test_the_version_is_the_distribution_s() -> None:
    from importlib.metadata import version

    import orch

    assert orch.__version__ == version("orch")
