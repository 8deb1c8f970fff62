#!/usr/bin/env bash
# safetensors 0.8.0 (numpy 2.4.6): equal tensors with equal metadata of several keys are saved as unequal bytes. The
# keys of `__metadata__` come in an order that differs from call to call in one process, so a checksum of a file does
# not tell whether its content changed, and equal trainings leave unequal files. With one key the bytes are equal.
#
# Seen: "3 keys: 6 different files of 100" and "1 key: 1 different file of 100".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - <<'EOF'
import json
import sys

import numpy as np
from safetensors.numpy import load, save

tensors = {"slots.mu": np.arange(4, dtype=np.float32)}
about = {"architecture": "slot attention", "dataset": "tetrominoes", "scores": "0.93"}
several = {save(tensors, about) for _ in range(100)}
one = {save(tensors, {"about": json.dumps(about, sort_keys=True)}) for _ in range(100)}
print(f"3 keys: {len(several)} different files of 100")
print(f"1 key: {len(one)} different file of 100")
assert all(np.array_equal(load(file)["slots.mu"], tensors["slots.mu"]) for file in several | one)
sys.exit(0 if len(several) > 1 and len(one) == 1 else 1)
EOF
