"""`python ec2_server.py PORT LOG`: moto's AWS on every address of this network namespace, in one process.

Three things are ours. Public addresses come from 198.18.0.0/15, which is nobody's (RFC 2544), so that nothing that moto
makes up can be somebody's. The metadata service knows who asks: a machine gets the credentials of its own profile's
role. And every signed request is written to LOG, one JSON object a line: who, which service, which action.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"

import moto.ec2.models.elastic_network_interfaces as interfaces
from moto.core.common_models import BackendDict
from moto.ec2.models import EC2Backend, ec2_backends
from moto.ec2.responses.instances import InstanceResponse
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.ssm.models import Parameter, ssm_backends
from moto.sts.models import sts_backends
from werkzeug.serving import run_simple

ACCOUNT = "123456789012"
REGION = "us-west-2"
UBUNTU = "/aws/service/canonical/ubuntu/server/"

_addresses = iter(f"198.18.1.{n}" for n in range(1, 255))
interfaces.random_public_ip = lambda: next(_addresses)


# Of a number of machines from MinCount to MaxCount, EC2 launches as many as it can; moto launches MinCount.
_get_param = InstanceResponse._get_param
InstanceResponse._get_param = lambda self, name, if_none=None: _get_param(
    self, "MaxCount" if name == "MinCount" else name, if_none
)


# Every machine that a call launches has the profile; moto gives it to the first.
_run_instances = EC2Backend.run_instances


def run_instances(self: EC2Backend, *args: Any, **words: Any) -> Any:
    made = _run_instances(self, *args, **words)
    for instance in made.instances[1:]:
        self.associate_iam_instance_profile(
            instance_id=instance.id, iam_instance_profile_arn=words["iam_instance_profile_arn"]
        )
    return made


EC2Backend.run_instances = run_instances


def _backend(backends: BackendDict[Any], region: str) -> Any:
    return backends[ACCOUNT][region]


def _some_ami() -> str:
    images = _backend(ec2_backends, REGION).describe_images()
    return str(next(image.id for image in images if image.architecture == "x86_64"))


def publish(name: str, value: str) -> None:
    """A public parameter, as AWS and others publish them below /aws/service."""
    store = _backend(ssm_backends, REGION)
    store._parameters[name].append(
        Parameter(
            account_id=ACCOUNT,
            name=name,
            value=value,
            parameter_type="String",
            description="",
            allowed_pattern=None,
            keyid=None,
            last_modified_date=0,
            version=1,
            data_type="aws:ec2:image",
        )
    )


class Metadata:
    """http://169.254.169.254, version 2: a token first, then what the asking machine may know."""

    def __init__(self, tell: Callable[[dict[str, str]], object]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._sessions: dict[str, dict[str, str]] = {}

    def answer(self, environ: dict[str, Any]) -> tuple[str, str]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/latest/api/token":
            return ("200 OK", "v2") if method == "PUT" else ("405 Method Not Allowed", "")
        if environ.get("HTTP_X_AWS_EC2_METADATA_TOKEN") != "v2":
            return "401 Unauthorized", ""
        instance = next(
            (one for one in _backend(ec2_backends, REGION).all_instances() if one.private_ip == environ["REMOTE_ADDR"]),
            None,
        )
        if instance is None:
            return "404 Not Found", ""
        role = self._role(instance)
        folder = "/latest/meta-data/iam/security-credentials/"
        if path == folder and role is not None:
            return "200 OK", role.name
        if role is not None and path == folder + role.name:
            return "200 OK", json.dumps(self._session(role.arn, instance.id))
        facts = {"instance-id": instance.id, "placement/region": REGION, "local-ipv4": instance.private_ip}
        found = facts.get(path.removeprefix("/latest/meta-data/"))
        return ("404 Not Found", "") if found is None else ("200 OK", found)

    def _role(self, instance: Any) -> Any:
        profile = instance.iam_instance_profile
        if not profile:
            return None
        arn = profile.get("Arn") if isinstance(profile, dict) else profile.arn
        found = _backend(iam_backends, "aws").get_instance_profile_by_arn(arn)
        return found.roles[0] if found.roles else None

    def _session(self, role: str, instance: str) -> dict[str, str]:
        with self._lock:
            if instance not in self._sessions:
                made = _backend(sts_backends, "aws").assume_role(
                    region_name=REGION, role_session_name=instance, role_arn=role, policy=None, duration=3600,
                    external_id=None,
                )  # fmt: skip
                self._tell({"session": made.access_key_id, "role": role.rpartition("/")[2], "instance": instance})
                self._sessions[instance] = {
                    "Code": "Success",
                    "Type": "AWS-HMAC",
                    "LastUpdated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "AccessKeyId": made.access_key_id,
                    "SecretAccessKey": made.secret_access_key,
                    "Token": made.session_token,
                    "Expiration": (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            return self._sessions[instance]


class Front:
    """In front of moto: the metadata service, and the log of what is asked."""

    def __init__(self, moto: Callable[..., Iterable[bytes]], log: str) -> None:
        self._moto = moto
        self._log = open(log, "a", buffering=1)
        self._metadata = Metadata(self._tell)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("HTTP_HOST", "").partition(":")[0] == "169.254.169.254":
            status, text = self._metadata.answer(environ)
            start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
            return [text.encode()]
        if environ["PATH_INFO"] == "/checkip":
            text = environ["REMOTE_ADDR"] + "\n"
            start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
            return [text.encode()]
        self._write(environ)
        return self._moto(environ, start_response)

    def _write(self, environ: dict[str, Any]) -> None:
        scope = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].partition(",")[0].split("/")
        if len(scope) < 4:
            return
        action = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if scope[3] in ("ec2", "iam", "sts"):
            length = int(environ.get("CONTENT_LENGTH") or 0)
            body = environ["wsgi.input"].read(length)
            import io

            environ["wsgi.input"] = io.BytesIO(body)
            action = parse_qs(body.decode()).get("Action", [action])[0]
        elif "HTTP_X_AMZ_TARGET" in environ:
            action = environ["HTTP_X_AMZ_TARGET"].rpartition(".")[2]
        self._tell({"from": environ["REMOTE_ADDR"], "key": scope[0], "service": scope[3], "action": action})

    def _tell(self, line: dict[str, str]) -> None:
        self._log.write(json.dumps(line) + "\n")


def main(port: str, log: str) -> None:
    os.environ.setdefault("AWS_DEFAULT_REGION", REGION)
    publish(f"{UBUNTU}24.04/stable/current/amd64/hvm/ebs-gp3/ami-id", _some_ami())
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("0.0.0.0", int(port), Front(app, log), threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(*sys.argv[1:])
