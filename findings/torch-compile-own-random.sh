#!/usr/bin/env bash
# torch 2.13.0: torch.compile draws from a `random.Random` that a module owns once, while it traces, and every call gets
# that number: noise, dropped slots or sampled indices that are made so are frozen, without a warning. Numbers of the
# module `random` itself are drawn anew at every call. The backend does not matter; "eager" compiles nothing.
#
# Seen: "its own: 1 number in 5 calls; plain code: 5; of the module random: 5".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$work/draw.py" <<'EOF'
import random
import sys

import torch


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.random = random.Random(1)

    def forward(self, slots):
        return slots + self.random.random()


class Shared(torch.nn.Module):
    def forward(self, slots):
        return slots + random.random()


def numbers(call):
    return len({call(torch.zeros(())).item() for _ in range(5)})


own, plain, shared = numbers(torch.compile(Own(), backend="eager")), numbers(Own()), numbers(torch.compile(Shared(), backend="eager"))
print(f"its own: {own} number in 5 calls; plain code: {plain}; of the module random: {shared}")
sys.exit(0 if (own, plain, shared) == (1, 5, 5) else 1)
EOF
"$work/venv/bin/python" -W ignore "$work/draw.py"
