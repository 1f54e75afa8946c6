"""What is made in an AWS account, found again, kept as it shall be, and removed: against moto, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("moto", exc_type=ImportError)
import boto3
from moto import mock_aws

from orch.cloud.aws import Account, CloudError
from orch.cloud.plan import Image

REGION = "us-west-2"


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws():
        yield Account(REGION)


def client(service: str) -> Any:
    return boto3.client(service, region_name=REGION)


def ingress(group: str) -> list[Any]:
    (found,) = client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    return list(found["IpPermissions"])


def launch(cluster: str, kind: str, count: int = 1) -> list[str]:
    tags = [{"Key": "ray-cluster-name", "Value": cluster}, {"Key": "ray-node-type", "Value": kind}]
    made = client("ec2").run_instances(
        ImageId=client("ec2").describe_images()["Images"][0]["ImageId"],
        InstanceType="t3.micro",
        MinCount=count,
        MaxCount=count,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )
    return [one["InstanceId"] for one in made["Instances"]]


def test_the_bucket_is_private_and_made_once(account: Account) -> None:
    name = account.bucket()
    assert name == "orch-123456789012-us-west-2"
    assert account.make_bucket(name) is True
    assert account.make_bucket(name) is False
    block = client("s3").get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
    assert set(block.values()) == {True}


def test_roles_are_as_they_shall_be_whatever_was_there(account: Account) -> None:
    first = account.make_roles("app", "bucket", "app")
    assert account.make_roles("app", "other-bucket", "app") == first
    for short, arn in zip(("flow", "work"), first, strict=True):
        name = f"orch-app-{short}-us-west-2"
        assert arn.endswith(f":instance-profile/{name}")
        policy = client("iam").get_role_policy(RoleName=name, PolicyName="orch")["PolicyDocument"]
        assert "other-bucket/app/*" in json.dumps(policy) and ":bucket/" not in json.dumps(policy)
        profile = client("iam").get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        assert [role["RoleName"] for role in profile["Roles"]] == [name]
    account.make_spot_role()
    account.make_spot_role()


def test_port_22_is_open_to_the_caller_alone(account: Account) -> None:
    vpc = account.network(())
    group = account.make_security_group("app", vpc, "203.0.113.7/32")
    assert account.make_security_group("app", vpc, "203.0.113.7/32") == group
    account.admit("app", vpc, "203.0.113.8/32")
    inside, outside = sorted(ingress(group), key=lambda rule: rule["IpProtocol"])
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group] and not inside["IpRanges"]
    assert (outside["FromPort"], outside["ToPort"], outside["IpProtocol"]) == (22, 22, "tcp")
    assert [one["CidrIp"] for one in outside["IpRanges"]] == ["203.0.113.8/32"]


def test_only_the_clusters_own_machines_are_ended(account: Account) -> None:
    head, *works = [*launch("orch-app", "head"), *launch("orch-app", "worker", 2)]
    (other,) = launch("orch-other", "head")
    said: list[str] = []
    assert account.await_gone("orch-app", said=said.append) == []
    assert sorted(said) == sorted(
        [f"ending {head} (t3.micro, the Flow VM)", *(f"ending {name} (t3.micro, a Work VM)" for name in works)]
    )
    assert [one["InstanceId"] for one in account.instances("orch-other")] == [other]
    assert account.await_gone("orch-app", said=said.append) == []


def test_what_was_made_can_be_removed_and_removed_again(account: Account) -> None:
    account.make_roles("app", "bucket", "app")
    account.make_security_group("app", account.network(()), "203.0.113.7/32")
    account.make_key_pair("orch-app", KEY)
    removed = account.remove("app", "orch-app")
    assert "role orch-app-flow-us-west-2" in removed and "role orch-app-work-us-west-2" in removed
    assert client("iam").list_roles()["Roles"] == []
    names = [group["GroupName"] for group in client("ec2").describe_security_groups()["SecurityGroups"]]
    assert "orch-app" not in names and not client("ec2").describe_key_pairs()["KeyPairs"]
    assert account.remove("app", "orch-app") == ["key pair orch-app"]


def test_an_image_is_found_by_number_and_what_is_missing_is_named(account: Account) -> None:
    ami = client("ec2").describe_images()["Images"][0]["ImageId"]
    found = account.find_image(Image("own", ami=ami))
    assert found.ami == ami and found.root.startswith("/dev/")
    with pytest.raises(CloudError, match="ami-00000000"):
        account.find_image(Image("own", ami="ami-00000000"))
    with pytest.raises(CloudError, match="GetParameter"):
        account.find_image(Image("own", parameter="/nowhere"))


def test_a_launch_is_tried_without_being_made(account: Account) -> None:
    flow, _ = account.make_roles("app", "bucket", "app")
    ami = client("ec2").describe_images()["Images"][0]["ImageId"]
    node = {"InstanceType": "m6i.large", "ImageId": ami, "IamInstanceProfile": {"Arn": flow}}
    account.await_launchable(node, lambda text: None)
    assert not client("ec2").describe_instances()["Reservations"]


def test_a_region_without_a_network_is_an_error_that_helps(account: Account) -> None:
    ec2 = client("ec2")
    (vpc,) = ec2.describe_vpcs()["Vpcs"]
    for subnet in ec2.describe_subnets()["Subnets"]:
        ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    ec2.delete_vpc(VpcId=vpc["VpcId"])
    with pytest.raises(CloudError, match="no default VPC") as caught:
        account.network(())
    assert "ORCH_AWS_SUBNETS" in caught.value.hint


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0s1x2Yh6cQp3sO3hQyM1oY2rNfXJ8m1l5nQp3fT9aB orch app"
