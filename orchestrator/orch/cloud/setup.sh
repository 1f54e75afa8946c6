#!/bin/bash
# Sets a machine up for orch. Ray runs it over SSH, on the Flow VM from the user's machine, on a Work VM from the Flow VM.
# Beside it lie: wanted (lines name=value), orch's wheel, and requirements.txt if the app has one.
set -euo pipefail
cd "$(dirname "$0")"
. ./wanted

# An image that was made ready has exactly this orch and this Ray in /opt/orch.
ready='import importlib.metadata as m, sys; sys.exit([m.version("orch"), m.version("ray")] != sys.argv[1:])'
if [ -x /opt/orch/bin/python ] && /opt/orch/bin/python -P -c "$ready" "$orch" "$ray"; then
    echo /opt/orch >~/.orch-path
    exit 0
fi

env=$HOME/.orch-env
if [ "$(cat "$env/.stamp" 2>/dev/null)" != "$stamp" ]; then
    if [ ! -x ~/.orch-uv/uv ]; then
        curl --proto '=https' --tlsv1.2 -LsSf --retry 5 "https://astral.sh/uv/$uv/install.sh" |
            env UV_UNMANAGED_INSTALL="$HOME/.orch-uv" sh
    fi
    ~/.orch-uv/uv venv --python "$python" --seed --clear "$env"
    packages=("orch[aws,ui] @ file://$PWD/$wheel" "ray[default]==$ray")
    if [ -f requirements.txt ]; then packages+=(-r requirements.txt); fi
    ~/.orch-uv/uv pip install --python "$env/bin/python" "${packages[@]}"
    echo "$stamp" >"$env/.stamp"
fi
echo "$env" >~/.orch-path
