"""The parts of gpu.sh that are neither tests nor benchmarks, a file for each kind."""
