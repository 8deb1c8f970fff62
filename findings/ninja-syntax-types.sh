#!/usr/bin/env bash
# ninja 1.13.2 (the package on PyPI) ships types with `ninja_syntax` that no program can satisfy: `Writer` is declared to
# write to a `str`, and `build` to take a list of outputs alone. `Writer` calls `output.write`, which a str has not, and
# `build` takes one name as well. mypy 2.4.1 refuses the calls that work, and passes the one that raises.
#
# Seen: two arg-type errors of the program that prints a build file, none of the one that raises AttributeError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ninja==1.13.2 mypy==2.4.1
cat > "$work/works.py" <<'EOF'
import io

from ninja import ninja_syntax

text = io.StringIO()
writer = ninja_syntax.Writer(text)
writer.rule("cc", "c++ -c $in -o $out")
writer.build("a.o", "cc", ["a.cpp"])
print(text.getvalue())
EOF
cat > "$work/raises.py" <<'EOF'
from ninja import ninja_syntax

ninja_syntax.Writer("build.ninja").rule("cc", "c++ -c $in -o $out")
EOF
cd "$work"
venv/bin/python works.py | grep -qx "build a.o: cc a.cpp"
if venv/bin/python raises.py 2> said; then exit 1; fi
grep "AttributeError: 'str' object has no attribute 'write'" said
venv/bin/mypy works.py && exit 1 || test "$(venv/bin/mypy works.py | grep -c 'arg-type')" = 2
venv/bin/mypy raises.py
