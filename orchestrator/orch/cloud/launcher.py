"""`python -m orch.cloud.launcher CONFIG FD`: `ray up`, in a process of its own. The one file that uses Ray's launcher.

Ray's launcher prints much, leaves the process when it fails, and reads the environment: its output goes to a log file,
and each step that it takes is one JSON line on FD.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

__all__ = ["STEPS"]

STEPS = {
    "acquiring_new_head_node": "launching the Flow VM",
    "head_node_acquired": "the Flow VM is launched, waiting for it to start",
    "ssh_control_acquired": "connected to the Flow VM",
    "run_setup_cmd": "setting the Flow VM up",
    "start_ray_runtime": "starting Ray there",
}
"""Ray's events, in words."""


def main(config_file: str, fd: int) -> int:
    os.environ["RAY_UP_enable_autoscaler_v2"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with open(config_file, encoding="utf-8") as file:
        config = json.load(file)
    from ray.autoscaler import sdk
    from ray.autoscaler._private.event_system import CreateClusterEvent

    def tell(value: dict[str, Any]) -> None:
        os.write(fd, json.dumps(value).encode() + b"\n")

    def step(name: str) -> Any:
        return lambda _: tell({"step": STEPS[name]})

    for event in CreateClusterEvent:
        if event.name in STEPS:
            sdk.register_callback_handler(event, step(event.name))
    try:
        # The cache would answer for an account that has changed meanwhile.
        sdk.create_or_update_cluster(config, no_config_cache=True)
    except BaseException as error:
        tell({"error": f"{type(error).__name__}: {getattr(error, 'message', None) or error}"})
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
