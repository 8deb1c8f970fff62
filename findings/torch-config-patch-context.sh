#!/usr/bin/env bash
# torch 2.13.0: each use of `torch._dynamo.config.patch(...)` as a context manager leaves a variable in the thread's
# context that is never removed. A long run that patches an option around every call, as a wrapper of torch.compile is
# bound to, grows for ever, and so does each copy of the context that asyncio takes.
#
# Seen: "1000 uses leave 1000 more variables in the context".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$work/patch.py" <<'EOF'
import contextvars
import sys

import torch._dynamo


def use(times):
    for _ in range(times):
        with torch._dynamo.config.patch(trace_numpy=False):
            pass
    return len(contextvars.copy_context())


before = use(10)
left = use(1000) - before
print(f"1000 uses leave {left} more variables in the context")
sys.exit(0 if left == 1000 else 1)
EOF
"$work/venv/bin/python" -W ignore "$work/patch.py"
