"""A part of gpu.sh that is neither tests nor benchmarks: python3 -m bench.gpu PART FOLDER writes FOLDER/PART.json.

Where there is no GPU they run at toy sizes in Triton's interpreter, which proves that they work and no more.
"""

from __future__ import annotations

import json
import sys

from bench.gpu import correctness, launch_settings, machine, summary, training
from bench.gpu.part import write

PARTS = {
    part.__name__: part
    for part in (
        machine.machine,
        machine.build,
        correctness.accuracy,
        correctness.sanitize,
        correctness.repeats,
        launch_settings.launch_settings,
        training.training,
        summary.summary,
    )
}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PARTS:
        print(f"{__doc__}\nParts: {', '.join(PARTS)}.", file=sys.stderr)
        sys.exit(2)
    name = sys.argv[1]
    result = PARTS[name]()
    write(name, result)
    if name == "machine":
        print(json.dumps(result, indent=1))
    sys.exit(1 if result.get("failed") else 0)
