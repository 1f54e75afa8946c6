"""The notice that a spot machine will be taken away, as EC2 gives it: two minutes before.

Source: AWS, "Spot Instance interruption notices" (the `spot/instance-action` item of the instance metadata, to be
looked at every 5 seconds) and "Use the Instance Metadata Service" (IMDSv2, session tokens).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import urllib.error
import urllib.request

__all__ = ["await_reclaim"]

log = logging.getLogger(__name__)

LOOK_EVERY = 5.0
NOBODY_EVERY = 60.0
"""Seconds between looks where nobody answers: this is no machine of EC2, or its metadata are switched off."""
ANSWER = 2.0
TOKEN_LASTS = 21_600


async def await_reclaim() -> str:
    """Returns when this machine is going to be taken away: what was said, and when (UTC)."""
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    while True:
        try:
            notice = await asyncio.to_thread(_notice, endpoint)
        except (OSError, ValueError) as error:
            log.debug("no instance metadata: %s", error)
            await asyncio.sleep(NOBODY_EVERY)
            continue
        if notice:
            return notice
        await asyncio.sleep(LOOK_EVERY)


def _notice(endpoint: str) -> str:
    """Empty as long as there is none. Raises OSError, ValueError."""
    token = _ask(f"{endpoint}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LASTS)}, "PUT")
    try:
        said = _ask(
            f"{endpoint}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token.decode()}, "GET"
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return ""
        raise
    notice = json.loads(said)
    return f"EC2 will {notice.get('action', 'take')} this spot machine at {notice.get('time', 'once')}"


def _ask(url: str, headers: dict[str, str], method: str) -> bytes:
    request = urllib.request.Request(url, headers=headers, method=method)
    # The metadata are this machine's own: never by way of a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=ANSWER) as answer:
        return bytes(answer.read())
