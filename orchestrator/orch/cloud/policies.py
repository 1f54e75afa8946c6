"""The documents that AWS wants: who may do what. PURE; docs/aws.md says what each statement is for."""

from __future__ import annotations

from typing import Any

__all__ = ["TRUST", "flow_policy", "flow_prefix", "work_policy"]

VERSION = "2012-10-17"

TRUST: dict[str, Any] = {
    "Version": VERSION,
    "Statement": [
        {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"},
    ],
}


def flow_prefix(prefix: str) -> str:
    """Where in the Drive's bucket the Flow VM keeps what Work VMs shall not read: the copy of the journal."""
    # No app's name begins with a dot: the copy of one is never the Drive of another.
    return f".flow/{prefix}" if prefix else ".flow"


def _drive(bucket: str, prefix: str, partition: str, *, sid: str = "Drive") -> list[dict[str, Any]]:
    arn = f"arn:{partition}:s3:::{bucket}"
    below = f"{prefix}/*" if prefix else "*"
    return [
        {
            "Sid": f"{sid}List",
            "Effect": "Allow",
            "Action": ["s3:ListBucket", "s3:ListBucketMultipartUploads"],
            "Resource": arn,
            "Condition": {"StringLike": {"s3:prefix": [below]}},
        },
        {"Sid": f"{sid}Region", "Effect": "Allow", "Action": ["s3:GetBucketLocation"], "Resource": arn},
        {
            "Sid": f"{sid}Files",
            "Effect": "Allow",
            "Action": [
                "s3:GetObject",
                "s3:PutObject",
                "s3:DeleteObject",
                "s3:AbortMultipartUpload",
                "s3:ListMultipartUploadParts",
            ],
            "Resource": f"{arn}/{below}",
        },
    ]


def work_policy(bucket: str, prefix: str, *, partition: str = "aws") -> dict[str, Any]:
    """Of a Work VM: the Drive, nothing else; not the copy of the journal, though the Drive were the whole bucket."""
    hidden: dict[str, Any] = {
        "Sid": "NotTheJournal",
        "Effect": "Deny",
        "Action": ["s3:*"],
        "Resource": f"arn:{partition}:s3:::{bucket}/{flow_prefix('')}/*",
    }
    return {"Version": VERSION, "Statement": [*_drive(bucket, prefix, partition), hidden]}


def flow_policy(
    bucket: str, prefix: str, *, cluster: str, region: str, account: str, work_role: str, partition: str = "aws"
) -> dict[str, Any]:
    """Of the Flow VM: the Drive, the journal's copy, and making and ending the machines of its own cluster."""
    ec2 = f"arn:{partition}:ec2:{region}"
    tagged = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster}}
    named = {"StringEquals": {"aws:RequestTag/ray-cluster-name": cluster}}
    statements: list[dict[str, Any]] = [
        {
            "Sid": "Look",
            "Effect": "Allow",
            "Action": ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeSubnets",
                       "ec2:DescribeSecurityGroups", "ec2:DescribeImages", "ec2:DescribeKeyPairs"],
            "Resource": "*",
        },
        {
            "Sid": "LaunchOwn",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": f"{ec2}:{account}:instance/*",
            "Condition": named,
        },
        {
            "Sid": "LaunchWith",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [f"{ec2}::image/*",
                         *(f"{ec2}:{account}:{kind}/*" for kind in (
                             "subnet", "security-group", "network-interface", "volume", "key-pair",
                             "spot-instances-request"))],
        },
        {
            "Sid": "TagAtLaunch",
            "Effect": "Allow",
            "Action": "ec2:CreateTags",
            "Resource": f"{ec2}:{account}:*/*",
            "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
        },
        {
            "Sid": "TagAndEndOwn",
            "Effect": "Allow",
            "Action": ["ec2:CreateTags", "ec2:TerminateInstances"],
            "Resource": f"{ec2}:{account}:instance/*",
            "Condition": tagged,
        },
        {
            "Sid": "GiveRole",
            "Effect": "Allow",
            "Action": "iam:PassRole",
            "Resource": work_role,
            "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        },
    ]  # fmt: skip
    files = [
        *_drive(bucket, prefix, partition),
        *_drive(bucket, flow_prefix(prefix), partition, sid="Journal"),
    ]
    return {"Version": VERSION, "Statement": [*statements, *files]}
