"""Computes -> plan -> the configuration of a Ray cluster, and what travels to it. Nothing is asked of AWS here."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import http.server
import io
import json
import threading
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest

from orch import CloudCompute
from orch.cli import main
from orch.cli.cloud_head import unpack
from orch.cli.target import find_cloud
from orch.cloud.apps import CloudApp, find_app, known, remember
from orch.cloud.aws import explain, explained_text
from orch.cloud.cluster import CONFIG_VARIABLE, Found, Made, cluster_config, facts_of_head
from orch.cloud.plan import Image, Plan, describe, machine_key, make_plan, slug
from orch.cloud.policies import flow_policy, flow_prefix, work_policy
from orch.cloud.prices import AS_OF, NAMES, TYPES
from orch.cloud.up import caller
from orch.cloud.wheel import build_wheel
from orch.errors import OrchError, UsageError

CPU, GPU = Image("cpu image", parameter="/cpu"), Image("gpu image", ami="ami-gpu")
ROOT = Path(__file__).resolve().parents[2]


def fields(compute: CloudCompute) -> dict[str, Any]:
    return dict(compute.to_state()["$compute"])


def plan(*computes: CloudCompute, region: str = "us-west-2", **words: Any) -> Plan:
    works = [(f"work{n}", fields(compute)) for n, compute in enumerate(computes)]
    return make_plan("My App", works, region=region, ray="2.60.0", python="3.11", cpu_image=CPU, gpu_image=GPU, **words)


def made(folder: Path) -> Made:
    return Made(
        key_pair="pair",
        private_key=folder / "key",
        security_group="sg-1",
        flow_profile="arn:flow",
        work_profile="arn:work",
        images={"cpu image": Found("ami-cpu", "/dev/sda1", 8), "gpu image": Found("ami-gpu", "/dev/xvda", 200)},
        token=folder / "token",
        shipped=folder / "shipped",
    )


# ---- the plan


def test_equal_computes_share_a_kind_of_machine_and_the_count_is_no_part_of_it() -> None:
    found = plan(CloudCompute("gpu"), CloudCompute("gpu", count=3), CloudCompute("gpu", interruptible=True))
    by_key = {machine.key: machine for machine in found.machines}
    assert by_key["orch_gpu"].works == ("work0", "work1")
    assert by_key["orch_gpu"].wanted == 4
    (spot,) = [machine for machine in found.machines if machine.spot]
    assert spot.key.startswith("orch_gpu_") and spot.wanted == 1
    assert by_key["orch_cpu"].wanted == 0, "the default is there for works that are made later"


def test_a_key_says_the_same_on_the_laptop_and_on_the_flow_vm() -> None:
    compute = CloudCompute("gpu-fast", disk_size=200, idle_timeout=0.0)
    again = json.loads(json.dumps(fields(compute)))
    assert machine_key(again) == machine_key(fields(compute))
    assert machine_key(fields(CloudCompute())) == "orch_cpu"
    assert machine_key(fields(CloudCompute("c7i.large"))).startswith("orch_c7i-large")
    different = [
        CloudCompute("gpu"),
        CloudCompute("gpu", cpus=2),
        CloudCompute("gpu", disk_size=9),
        CloudCompute("cpu"),
    ]
    assert len({machine_key(fields(one)) for one in different}) == len(different)


@pytest.mark.parametrize(
    ("compute", "instance_type"),
    [
        (CloudCompute(), "m6i.large"),
        (CloudCompute("cpu-medium"), "m6i.2xlarge"),
        (CloudCompute("gpu"), "g4dn.xlarge"),
        (CloudCompute("gpu-fast"), "g5.2xlarge"),
        (CloudCompute("gpu-fast-multi"), "g5.12xlarge"),
        (CloudCompute("cpu", cpus=7), "m6i.2xlarge"),
        (CloudCompute("cpu", memory=100), "m6i.8xlarge"),
        (CloudCompute("gpu", gpus=4), "g4dn.12xlarge"),
        (CloudCompute("gpu", instance_type="g6e.xlarge"), "g6e.xlarge"),
        (CloudCompute("p5.48xlarge"), "p5.48xlarge"),
    ],
)
def test_the_instance_type(compute: CloudCompute, instance_type: str) -> None:
    (machine,) = [machine for machine in plan(compute).machines if machine.wanted]
    assert machine.instance_type == instance_type


@pytest.mark.parametrize(
    ("compute", "says"),
    [
        (CloudCompute("huge"), "work0: 'huge' is no name of a compute"),
        (CloudCompute("cpu", cpus=500), "no machine of 'cpu' is large enough"),
        (CloudCompute("cpu", instance_type="m6i.large", cpus=4), "work0: m6i.large has 2 vCPUs, not 4"),
        (CloudCompute("cpu", gpus=1), "has 0 GPUs, not 1"),
    ],
)
def test_a_compute_that_cannot_be_had_is_named(compute: CloudCompute, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan(compute)


def test_the_plan_as_it_is_shown() -> None:
    text = "\n".join(describe(plan(CloudCompute("gpu", interruptible=True, count=2, idle_timeout=5), CloudCompute())))
    assert "My App, in AWS region us-west-2" in text
    assert "up to $0.526/h" in text and "0 to 2" in text and "spot" in text
    assert f"up to ${0.096 + 0.096 + 2 * 0.526:.3f}/h" in text
    assert AS_OF in text and "given back 5 s to 60 s after" in text
    elsewhere = "\n".join(describe(plan(CloudCompute("gpu"), region="eu-west-1")))
    assert "unknown" in elsewhere and "$" not in elsewhere


def test_names_and_the_page_about_them_agree() -> None:
    page = (ROOT / "docs" / "compute.md").read_text()
    for name, instance_type in NAMES.items():
        kind = TYPES[instance_type]
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == f"`{instance_type}`" and cells[2] == str(kind.vcpus) and cells[3] == f"{kind.memory} GiB"
        assert cells[4].startswith(f"{kind.gpus} x {kind.gpu}" if kind.gpus else "none")


@pytest.mark.parametrize(("name", "said"), [("My App", "my-app"), ("a_b.c", "a-b-c"), ("x" * 64, "x" * 32)])
def test_an_apps_name_as_aws_takes_it(name: str, said: str) -> None:
    assert slug(name) == said
    with pytest.raises(UsageError, match="no letter or digit"):
        slug("...")


# ---- the cluster


def test_the_clusters_configuration(tmp_path: Path) -> None:
    found = plan(CloudCompute("gpu", disk_size=50, interruptible=True, shm_size=4), CloudCompute("c7i.large"))
    config = cluster_config(found, made(tmp_path))
    types = config["available_node_types"]
    flow = types[config["head_node_type"]]
    assert flow["resources"] == {"CPU": 0} and flow["max_workers"] == 0
    assert flow["node_config"]["IamInstanceProfile"] == {"Arn": "arn:flow"}
    assert config["provider"]["cache_stopped_nodes"] is False
    works = {name: node for name, node in types.items() if name != config["head_node_type"]}
    for machine in found.machines:
        node = works[machine.key.removeprefix("orch_")]
        assert node["resources"][machine.key] == 1 and node["min_workers"] == 0
        assert node["node_config"]["IamInstanceProfile"] == {"Arn": "arn:work"}
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node["node_config"]["SecurityGroupIds"] == ["sg-1"]
        spot = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert spot == ("spot" if machine.spot else None)
    (gpu,) = [node for name, node in works.items() if name.startswith("gpu")]
    assert gpu["resources"]["GPU"] == 1
    (disk,) = gpu["node_config"]["BlockDeviceMappings"]
    assert disk["DeviceName"] == "/dev/xvda" and disk["Ebs"]["VolumeSize"] == 200, "the image has so much"
    assert "size=4096m /dev/shm" in gpu["node_config"]["UserData"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("RAY_AUTH_MODE=token" in command for command in config[commands])
    assert config["file_mounts"]["~/.ray/auth_token"] == str(tmp_path / "token")
    assert "key" not in json.dumps(config["file_mounts"]), "no key of this machine travels but by Ray, to the Flow VM"


def test_ray_takes_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("ray", exc_type=ImportError)
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster_config(plan(CloudCompute("gpu", interruptible=True)), made(tmp_path)), schema)


def test_a_server_on_the_flow_vm_knows_the_machines(tmp_path: Path) -> None:
    config = cluster_config(plan(CloudCompute("gpu")), made(tmp_path))
    path = tmp_path / "ray.yaml"
    path.write_text(json.dumps(config))
    assert facts_of_head({}) is None
    facts = facts_of_head({CONFIG_VARIABLE: str(path)})
    assert facts is not None
    machine_of, machines = facts
    assert machine_of(fields(CloudCompute("gpu"))) == "orch_gpu"
    assert {"orch_gpu": 1.0, "CPU": 4.0, "GPU": 1.0} in machines
    assert not any("orch_gpu" not in machine and "orch_cpu" not in machine for machine in machines)


# ---- who may do what


def allows(policy: dict[str, Any], action: str, resource: str) -> bool:
    effects = set()
    for statement in policy["Statement"]:
        actions, resources = statement["Action"], statement["Resource"]
        for one in [actions] if isinstance(actions, str) else actions:
            for pattern in [resources] if isinstance(resources, str) else resources:
                if fnmatch.fnmatchcase(action, one) and fnmatch.fnmatchcase(resource, pattern):
                    effects.add(statement["Effect"])
    return effects == {"Allow"}


def test_machines_reach_the_drives_prefix_and_nothing_beside_it() -> None:
    flow = flow_policy("b", "app", cluster="orch-app", region="r", account="1", work_role="arn:work")
    for policy in (flow, work_policy("b", "app")):
        assert allows(policy, "s3:PutObject", "arn:aws:s3:::b/app/x/y")
        assert not allows(policy, "s3:PutObject", "arn:aws:s3:::b/app2/x")
        assert not allows(policy, "s3:GetObject", "arn:aws:s3:::b/other/x")
        assert not allows(policy, "s3:DeleteBucket", "arn:aws:s3:::b")
        listing = next(one for one in policy["Statement"] if "s3:ListBucket" in one["Action"])
        assert listing["Condition"] == {"StringLike": {"s3:prefix": ["app/*"]}}
    journal = f"arn:aws:s3:::b/{flow_prefix('app')}/head.json"
    assert allows(flow, "s3:PutObject", journal)
    for prefix in ("app", ""):
        assert not allows(work_policy("b", prefix), "s3:GetObject", journal)
    assert {action.partition(":")[0] for one in work_policy("b", "p")["Statement"] for action in one["Action"]} == {
        "s3"
    }
    assert allows(flow, "iam:PassRole", "arn:work") and not allows(flow, "iam:PassRole", "arn:flow")
    (end,) = [one for one in flow["Statement"] if "ec2:TerminateInstances" in one["Action"]]
    assert end["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "orch-app"}}


# ---- what travels


def test_the_wheel_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    wheel = build_wheel(tmp_path / "a")
    assert wheel.read_bytes() == build_wheel(tmp_path / "b").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = [name for name in names if name.endswith(".dist-info/RECORD")]
        rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
        assert {row[0] for row in rows} == names
        for name, digest, _ in rows:
            if name != record:
                expected = urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
                assert digest == f"sha256={expected}"
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert b"orch = orch.cli:main" in archive.read(entry_points)
    assert {"orch/__init__.py", "orch_workers/__main__.py", "orch_drive/__init__.py", "orch_ui/__init__.py"} <= names
    assert "orch/cloud/setup.sh" in names


def package(**files: str) -> io.BytesIO:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    made.seek(0)
    return made


def test_a_folder_that_is_sent_again_takes_the_place_of_what_was_sent_before(tmp_path: Path) -> None:
    target, listed = tmp_path / "app", tmp_path / "listed"
    unpack(package(**{"app/app.py": "1", "app/old/gone.py": "x"}), target, listed)
    (target / ".orch").mkdir()
    (target / "written.txt").write_text("by a work")
    unpack(package(**{"app/app.py": "2", "app/new.py": "y"}), target, listed)
    assert (target / "app.py").read_text() == "2" and (target / "new.py").exists()
    assert not (target / "old" / "gone.py").exists()
    assert (target / "written.txt").read_text() == "by a work" and (target / ".orch").is_dir()


@pytest.mark.parametrize("name", ["app/../../evil", "app//etc/passwd", "app/.orch/token"])
def test_a_package_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(OrchError, match="the package holds"):
        unpack(package(**{name: "x"}), tmp_path / "app", tmp_path / "listed")
    assert not (tmp_path / "evil").exists()


# ---- on the user's machine


def test_what_is_remembered_is_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    app = CloudApp(
        name="My App", slug="my-app", region="r", account="1", partition="aws", bucket="b", prefix="my-app",
        drive="s3://b/my-app", app_file="/app.py", images=(("cpu image", "ami-1", "/dev/sda1", 8),),
    )  # fmt: skip
    remember(app)
    remember(app, app_token="secret")
    assert (app.folder / "app.json").stat().st_mode & 0o077 == 0 and app.folder.stat().st_mode & 0o077 == 0
    found = find_app("My App")
    assert found is not None and found.app_token == "secret" and found.images == app.images
    assert find_app("my-app") == found and find_app("other") is None and known() == [found]
    with app.lock(), pytest.raises(UsageError, match="another command"), app.lock():
        pass


def test_a_name_means_the_app_on_aws_unless_an_app_here_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    app = remember(
        CloudApp(
            name="studio", slug="studio", region="r", account="1", partition="aws", bucket="b", prefix="studio",
            drive="s3://b/studio", app_file="/app.py",
        )
    )  # fmt: skip
    (tmp_path / "studio").mkdir()
    assert find_cloud("studio") == app
    assert find_cloud("./studio") is None and find_cloud("other") is None
    (tmp_path / "studio" / ".orch").mkdir()
    assert find_cloud("studio") is None, "an app was run in that folder"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("UnauthorizedOperation", "does not allow you RunInstances"),
        ("VcpuLimitExceeded", "quota"),
        ("ExpiredToken", "log in again"),
        ("SomethingNew", "AWS refuses RunInstances"),
    ],
)
def test_an_answer_of_aws_is_one_line(code: str, says: str) -> None:
    error = explain(code, "RunInstances", "You are not.\n Encoded authorization failure message: xxxx")
    assert says in f"{error.message}; {error.hint}" and "Encoded" not in error.message
    log = f"noise\nbotocore...: An error occurred ({code}) when calling the RunInstances operation: no, no\nmore noise"
    found = explained_text(log)
    assert found is not None and "no, no" in found.message
    assert explained_text("nothing") is None


def test_who_may_come_in() -> None:
    assert caller({"ORCH_AWS_SSH_FROM": "203.0.113.7"}) == "203.0.113.7/32"
    with pytest.raises(UsageError, match="which address"):
        caller({"ORCH_AWS_SSH_FROM": "everybody"})

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"198.51.100.9\n")

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert caller({}, f"http://127.0.0.1:{server.server_port}/") == "198.51.100.9/32"
        thread.join()


APP = """
from orch import App, CloudCompute, Flow, ScriptWork
class Root(Flow):
    def __init__(self):
        super().__init__()
        self.train = ScriptWork("train.py", cloud_compute=CloudCompute("gpu"))
app = App(Root())
"""


def test_a_dry_run_asks_nothing_of_aws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", exc_type=ImportError)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    app_file = tmp_path / "cloudy_app.py"
    app_file.write_text(APP)
    assert main(["run", str(app_file), "--cloud", "aws", "--dry-run", "--name", "Some App"]) == 0
    said = capsys.readouterr().out
    assert "Some App, in AWS region us-east-2" in said and "g4dn.xlarge" in said and "train" in said
    assert not (tmp_path / "state").exists() and not (tmp_path / ".orch").exists()
    assert main(["run", str(app_file), "--cloud", "--drive", "/tmp/x", "--dry-run"]) == 2
    assert "out of the machines' reach" in capsys.readouterr().err
