"""What is made and asked for in an AWS account, through boto3. Every error is one line that says what to do.

For each app: a role and instance profile for its Flow VM and one for its Work VMs, a key pair, a security group; one
bucket for all apps of an account and region. Machines are made by Ray (`launcher`), and ended here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orch.cloud.cluster import Found, cluster_name
from orch.cloud.plan import Image
from orch.cloud.policies import TRUST, flow_policy, work_policy
from orch.errors import OrchError, UsageError

__all__ = ["ALIVE", "Account", "CloudError", "explain", "find_region"]

ALIVE = ("pending", "running", "stopping", "stopped")
LAUNCHABLE = 90.0
"""Seconds for which EC2 may not know a new role yet."""
GONE = 300.0
POLICY = "orch"
DOCS = "docs/aws.md lists what your user needs"

_HINTS = {
    "AuthFailure": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile",
    "InvalidClientTokenId": "check AWS_ACCESS_KEY_ID, or the profile",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY, or the profile",
    "ExpiredToken": "log in again (aws sso login)",
    "RequestExpired": "log in again (aws sso login), or set the clock",
    "OptInRequired": "the account or region must be activated first",
    "VcpuLimitExceeded": "ask for a higher quota of running vCPUs of that family (Service Quotas), or a smaller type",
    "MaxSpotInstanceCountExceeded": "ask for a higher spot quota (Service Quotas), or interruptible=False",
    "InstanceLimitExceeded": "ask for a higher quota (Service Quotas)",
    "InsufficientInstanceCapacity": "EC2 has none of that type left there: try later, another type or another region",
    "Unsupported": "that instance type does not exist there: another type, or another region",
    "InvalidAMIID.NotFound": "the image does not exist in that region: check ORCH_AWS_IMAGE",
    "InvalidAMIID.Malformed": "check ORCH_AWS_IMAGE",
    "BucketAlreadyExists": "somebody else has a bucket of that name: choose one with --drive s3://bucket/prefix",
    "AddressLimitExceeded": "ask for a higher quota (Service Quotas)",
}
_DENIED = ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "403", "Client.UnauthorizedOperation")
_SAID = re.compile(r"An error occurred \(([\w.]+)\) when calling the (\w+) operation[^:]*: ([^\n]*)")


class CloudError(OrchError):
    """AWS does not do what is asked."""


def explain(code: str, operation: str, message: str) -> CloudError:
    """An answer of AWS as one line."""
    message = message.split(" Encoded authorization failure message:")[0].strip().rstrip(".")
    if code in _DENIED:
        return CloudError(f"AWS does not allow you {operation}: {message}", hint=DOCS)
    return CloudError(f"AWS refuses {operation} ({code}): {message}", hint=_HINTS.get(code, "see docs/aws.md"))


def explained_text(text: str) -> CloudError | None:
    """The last answer of AWS that a program has printed."""
    found = _SAID.findall(text)
    return explain(*found[-1]) if found else None


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
        TokenRetrievalError,
    )

    try:
        yield
    except ClientError as error:
        said = error.response.get("Error", {})
        raise explain(said.get("Code", ""), error.operation_name, said.get("Message", str(error))) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise CloudError(
            "there are no AWS credentials here", hint="run `aws configure`, or set AWS_PROFILE or AWS_ACCESS_KEY_ID"
        ) from error
    except (CredentialRetrievalError, TokenRetrievalError) as error:
        raise CloudError(f"the AWS credentials cannot be had: {error}", hint="log in again (aws sso login)") from error
    except ProfileNotFound as error:
        raise CloudError(str(error), hint="check AWS_PROFILE") from error
    except EndpointConnectionError as error:
        raise CloudError(str(error), hint="is this machine online, and the region's name right?") from error
    except BotoCoreError as error:
        raise CloudError(f"AWS cannot be asked: {error}") from error


def find_region() -> str:
    """The region of the environment or the profile, else us-east-1. Raises CloudError."""
    return os.environ.get("AWS_REGION") or _session(None).region_name or "us-east-1"


def _session(region: str | None) -> Any:
    try:
        import boto3
    except ImportError as error:
        raise UsageError(
            f"run: --cloud aws needs {error.name}, which is not installed", hint="pip install 'orch[aws]'"
        ) from error
    with _asking():
        return boto3.session.Session(region_name=region)


class Account:
    """An AWS account as its user sees it, in one region. Nothing is asked before it is needed."""

    def __init__(self, region: str) -> None:
        self.region = region
        self._session = _session(region)
        self._clients: dict[str, Any] = {}
        self._who: tuple[str, str] | None = None

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            from botocore.config import Config

            config = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10)
            with _asking():
                self._clients[service] = self._session.client(service, config=config)
        return self._clients[service]

    def _ask(self, service: str, operation: str, **words: Any) -> dict[str, Any]:
        with _asking():
            return dict(getattr(self._client(service), operation)(**words))

    def _pages(self, service: str, operation: str, **words: Any) -> Iterator[dict[str, Any]]:
        with _asking():
            yield from self._client(service).get_paginator(operation).paginate(**words)

    def _made(self, codes: tuple[str, ...], service: str, operation: str, **words: Any) -> dict[str, Any] | None:
        """The answer; None if what shall be made (or looked at, or removed) gives one of these errors."""
        from botocore.exceptions import ClientError

        try:
            return self._ask(service, operation, **words)
        except CloudError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and cause.response.get("Error", {}).get("Code") in codes:
                return None
            raise

    def who(self) -> tuple[str, str]:
        """(account number, partition): the first question, which needs no permission."""
        if self._who is None:
            answer = self._ask("sts", "get_caller_identity")
            self._who = answer["Account"], answer["Arn"].split(":")[1]
        return self._who

    # ---- the drive

    def bucket(self) -> str:
        return f"orch-{self.who()[0]}-{self.region}"

    def make_bucket(self, name: str) -> bool:
        """Private and encrypted; True if it was made now."""
        if self._made(("404", "NoSuchBucket"), "s3", "head_bucket", Bucket=name) is not None:
            return False
        where: dict[str, Any] = {}
        if self.region != "us-east-1":
            where["CreateBucketConfiguration"] = {"LocationConstraint": self.region}
        self._ask("s3", "create_bucket", Bucket=name, **where)
        everything = dict.fromkeys(
            ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True
        )
        self._ask("s3", "put_public_access_block", Bucket=name, PublicAccessBlockConfiguration=everything)
        return True

    # ---- who may do what

    def make_roles(self, slug: str, bucket: str, prefix: str) -> tuple[str, str]:
        """The instance profiles (ARNs) of the app's Flow VM and of its Work VMs, their permissions as they shall be."""
        account, partition = self.who()
        work_profile, work_role = self._role(f"{slug}-work", work_policy(bucket, prefix, partition=partition))
        flow = flow_policy(
            bucket,
            prefix,
            cluster=cluster_name(slug),
            region=self.region,
            account=account,
            work_role=work_role,
            partition=partition,
        )
        flow_profile, _ = self._role(f"{slug}-flow", flow)
        return flow_profile, work_profile

    def _role_name(self, name: str) -> str:
        return f"orch-{name}-{self.region}"

    def _role(self, short: str, policy: Mapping[str, Any]) -> tuple[str, str]:
        name = self._role_name(short)
        exists = ("EntityAlreadyExists",)
        self._made(
            exists,
            "iam",
            "create_role",
            RoleName=name,
            AssumeRolePolicyDocument=json.dumps(TRUST),
            Description="Machines that `orch run --cloud aws` has made",
        )
        self._ask("iam", "put_role_policy", RoleName=name, PolicyName=POLICY, PolicyDocument=json.dumps(policy))
        role = self._ask("iam", "get_role", RoleName=name)["Role"]["Arn"]
        self._made(exists, "iam", "create_instance_profile", InstanceProfileName=name)
        profile = self._ask("iam", "get_instance_profile", InstanceProfileName=name)["InstanceProfile"]
        if not profile["Roles"]:
            self._ask("iam", "add_role_to_instance_profile", InstanceProfileName=name, RoleName=name)
        return profile["Arn"], role

    def make_spot_role(self) -> None:
        """EC2's own role for spot machines: an account has it once it has ever asked for one."""
        there = ("InvalidInput", "EntityAlreadyExists")
        self._made(there, "iam", "create_service_linked_role", AWSServiceName="spot.amazonaws.com")

    # ---- how to get in

    def make_key_pair(self, name: str, public: str) -> None:
        """EC2's copy of the public key, whatever it had under that name before."""
        self._ask("ec2", "delete_key_pair", KeyName=name)
        self._ask("ec2", "import_key_pair", KeyName=name, PublicKeyMaterial=public.encode())

    def network(self, subnets: tuple[str, ...]) -> str:
        """The VPC of the subnets, else the region's default one. Raises CloudError."""
        if subnets:
            found = self._ask("ec2", "describe_subnets", SubnetIds=list(subnets))["Subnets"]
            vpcs = {one["VpcId"] for one in found}
            if len(vpcs) != 1:
                raise CloudError(f"the subnets {', '.join(subnets)} are not in one VPC", hint="see ORCH_AWS_SUBNETS")
            return str(vpcs.pop())
        filters = [{"Name": "is-default", "Values": ["true"]}]
        vpcs = self._ask("ec2", "describe_vpcs", Filters=filters)["Vpcs"]
        if not vpcs:
            raise CloudError(
                f"the region {self.region} has no default VPC",
                hint="`aws ec2 create-default-vpc` makes one; or ORCH_AWS_SUBNETS=subnet-1,subnet-2 names public ones",
            )
        return str(vpcs[0]["VpcId"])

    def make_security_group(self, slug: str, vpc: str, caller: str) -> str:
        """The group of the app's machines: they reach each other; `caller` (a CIDR) reaches their port 22, nobody else
        does, and nothing else is open."""
        name = cluster_name(slug)
        group = self._group(name, vpc)
        if group is None:
            made = self._ask(
                "ec2",
                "create_security_group",
                GroupName=name,
                Description="Machines that orch run --cloud aws has made",
                VpcId=vpc,
                TagSpecifications=[
                    {"ResourceType": "security-group", "Tags": [{"Key": "orch-app", "Value": slug}]},
                ],
            )
            inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": made["GroupId"]}]}
            self._ask("ec2", "authorize_security_group_ingress", GroupId=made["GroupId"], IpPermissions=[inside])
            group = self._group(name, vpc)
            assert group is not None
        self._admit(group, caller)
        return str(group["GroupId"])

    def admit(self, slug: str, vpc: str, caller: str) -> None:
        """The user's machine has another address than before."""
        group = self._group(cluster_name(slug), vpc)
        if group is not None:
            self._admit(group, caller)

    def _group(self, name: str, vpc: str) -> dict[str, Any] | None:
        filters = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [vpc]}]
        groups = self._ask("ec2", "describe_security_groups", Filters=filters)["SecurityGroups"]
        return groups[0] if groups else None

    def _admit(self, group: Mapping[str, Any], caller: str) -> None:
        ranges = {
            one["CidrIp"]
            for rule in group["IpPermissions"]
            if rule.get("FromPort") == 22 and rule.get("IpProtocol") == "tcp"
            for one in rule.get("IpRanges", [])
        }

        def rule(cidr: str) -> list[dict[str, Any]]:
            return [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": cidr}]}]

        if caller not in ranges:
            self._ask("ec2", "authorize_security_group_ingress", GroupId=group["GroupId"], IpPermissions=rule(caller))
        for old in ranges - {caller}:
            self._ask("ec2", "revoke_security_group_ingress", GroupId=group["GroupId"], IpPermissions=rule(old))

    # ---- machines

    def find_image(self, image: Image) -> Found:
        """Raises CloudError."""
        ami = image.ami
        if not ami:
            ami = str(self._ask("ssm", "get_parameter", Name=image.parameter)["Parameter"]["Value"])
        images = self._ask("ec2", "describe_images", ImageIds=[ami])["Images"]
        if not images:
            raise CloudError(f"there is no image {ami} in {self.region}", hint="check ORCH_AWS_IMAGE")
        root = images[0].get("RootDeviceName") or "/dev/sda1"
        sizes = [
            disk["Ebs"].get("VolumeSize", 0)
            for disk in images[0].get("BlockDeviceMappings", [])
            if disk.get("DeviceName") == root and "Ebs" in disk
        ]
        return Found(ami, root, max(sizes, default=0))

    def instances(self, cluster: str, *states: str) -> list[dict[str, Any]]:
        """The cluster's machines in these states (default: those that cost something)."""
        filters = [
            {"Name": "tag:ray-cluster-name", "Values": [cluster]},
            {"Name": "instance-state-name", "Values": list(states or ALIVE)},
        ]
        return [
            instance
            for page in self._pages("ec2", "describe_instances", Filters=filters)
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        ]

    def await_launchable(self, node: Mapping[str, Any], said: Callable[[str], None]) -> None:
        """Asks EC2 whether it would launch such a machine: a role that was made just now takes some seconds to be known
        there, and what the user may not do is said before anything is made. Raises CloudError."""
        from botocore.exceptions import ClientError

        words = {name: value for name, value in node.items() if name != "SubnetIds"}
        if "SubnetIds" in node:
            words["SubnetId"] = node["SubnetIds"][0]
        deadline = time.monotonic() + LAUNCHABLE
        told = False
        while True:
            try:
                self._ask("ec2", "run_instances", MinCount=1, MaxCount=1, DryRun=True, **words)
                return
            except CloudError as error:
                cause = error.__cause__
                reply = cause.response.get("Error", {}) if isinstance(cause, ClientError) else {}
                if reply.get("Code") == "DryRunOperation":
                    return
                # "Value (arn:...) for parameter iamInstanceProfile.arn is invalid. Invalid IAM Instance Profile ARN"
                new = (
                    reply.get("Code") == "InvalidParameterValue"
                    and "nstanceprofile" in reply.get("Message", "").lower()
                )
                if not new or time.monotonic() > deadline:
                    raise
            if not told:
                said("waiting until EC2 knows the new roles")
                told = True
            time.sleep(2)

    def terminate(self, instances: list[str]) -> None:
        if instances:
            self._ask("ec2", "terminate_instances", InstanceIds=instances)

    def await_gone(self, cluster: str, *, said: Callable[[str], None]) -> list[str]:
        """Ends every machine of the cluster, those included that its Flow VM launches meanwhile, and waits until EC2
        has ended them. Returns those that are left after five minutes."""
        deadline = time.monotonic() + GONE
        asked: set[str] = set()
        while True:
            there = self.instances(cluster, *ALIVE, "shutting-down")
            names = [one["InstanceId"] for one in there if one["State"]["Name"] != "shutting-down"]
            if new := [name for name in names if name not in asked]:
                self.terminate(new)
                asked.update(new)
                for one in there:
                    if one["InstanceId"] in new:
                        said(f"ending {one['InstanceId']} ({one['InstanceType']}, {_kind(one)})")
            if not there:
                return []
            if time.monotonic() > deadline:
                return [one["InstanceId"] for one in there]
            time.sleep(1)

    # ---- what remains

    def remove(self, slug: str, key_pair: str) -> list[str]:
        """Removes the app's roles, key pair and security groups; returns what was removed. No machine may be left."""
        removed = []
        for short in (f"{slug}-flow", f"{slug}-work"):
            name = self._role_name(short)
            missing = ("NoSuchEntity",)
            self._made(missing, "iam", "remove_role_from_instance_profile", InstanceProfileName=name, RoleName=name)
            self._made(missing, "iam", "delete_instance_profile", InstanceProfileName=name)
            self._made(missing, "iam", "delete_role_policy", RoleName=name, PolicyName=POLICY)
            if self._made(missing, "iam", "delete_role", RoleName=name) is not None:
                removed.append(f"role {name}")
        self._ask("ec2", "delete_key_pair", KeyName=key_pair)
        removed.append(f"key pair {key_pair}")
        filters = [{"Name": "group-name", "Values": [cluster_name(slug)]}]
        for group in self._ask("ec2", "describe_security_groups", Filters=filters)["SecurityGroups"]:
            self._ask("ec2", "delete_security_group", GroupId=group["GroupId"])
            removed.append(f"security group {group['GroupId']}")
        return removed

    def role_names(self, slug: str) -> tuple[str, str]:
        return self._role_name(f"{slug}-flow"), self._role_name(f"{slug}-work")


def _kind(instance: Mapping[str, Any]) -> str:
    tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
    return "the Flow VM" if tags.get("ray-node-type") == "head" else "a Work VM"
