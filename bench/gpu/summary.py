"""How each part ended."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from typing import Any

from bench.gpu.part import folder


def summary() -> dict[str, Any]:
    """How each part ended, and how many tests did what."""
    out = folder()
    parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {"parts": parts}
    if (out / "tests.xml").exists():
        suite = ET.parse(out / "tests.xml").getroot().find("testsuite")
        result["tests"] = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        result["failures"] = [
            f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]  # fmt: skip
        (out / "tests.xml").unlink()
    (out / "parts.jsonl").unlink()
    for name in ("build", "sanitize"):  # files are few where they are fetched from afar
        if (out / f"{name}.json").exists():
            result[name] = json.loads((out / f"{name}.json").read_text())
            (out / f"{name}.json").unlink()
    late = re.findall(r"SKIPPED \[(\d+)\].*no time left", (out / "log.txt").read_text())
    result["benchmarks without time"] = sum(map(int, late))
    print(json.dumps(result, indent=1))
    return result
