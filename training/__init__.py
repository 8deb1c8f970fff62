"""What `train.py` is made of, a file for each subject: from the options and the run's folder to scores and pictures.

Every random number of a run is a function of its seed and the step, so a resumed run ends with the weights of one that
was never interrupted.
"""

import os

# Threads meet some hundred times in a step. Those that are there first spin for some 3 ms by default, and burn the time
# that the last one, whose core another program has, waits for; now for 0.1 ms, then they sleep. libgomp reads this when
# it is loaded, that is with torch. docs/experiments.md has what it is worth.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
