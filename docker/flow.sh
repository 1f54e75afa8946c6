#!/bin/bash
# The flow server of a container. With RAY_HEAD=host:port its Works run on that Ray cluster, of which this container
# becomes a machine that runs none; else they run in here. Arguments go to `orch run`.
set -euo pipefail
# The address must be reachable from outside the container; what may reach it is the published port's business.
serve=(--host 0.0.0.0 --port 7501 --no-open)
if [ -n "${RAY_HEAD:-}" ]; then
    ray start --address="$RAY_HEAD" --num-cpus=0 --object-store-memory=134217728 --include-log-monitor=false
    exec orch run --ray auto "${serve[@]}" "$@"
fi
exec orch run --local "${serve[@]}" "$@"
