#!/usr/bin/env bash
# All that there is to learn from a GPU, the cheapest proof first, within ten minutes:
#
#     bench/gpu.sh [FOLDER]          on the first CUDA device; FOLDER is bench/results/gpu unless given
#     bench/gpu.sh --dry-run [FOLDER]  the same at toy sizes in Triton's interpreter on a CPU: does the script itself work?
#
# Each part has a time limit and leaves its results in FOLDER before the next begins; whatever became of them,
# FOLDER/summary.json says what ran, for how long, and how it ended. Exit status 0: every part ended well.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  export TRITON_INTERPRET=1
  shift
fi
out=${1:-bench/results/gpu}
mkdir -p "$out"
rm -f "$out/parts.jsonl"
export IIO_KERNELS_COMMIT=${IIO_KERNELS_COMMIT:-$(git rev-parse HEAD 2> /dev/null)}
failed=0

# part NAME SECONDS COMMAND...: on the GPU, and part NAME SECONDS COMMAND... with its toy in the variable `toy` dry.
part() {
  local name=$1 limit=$2 begun=$SECONDS status=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  printf '{"part": "%s", "status": %d, "seconds": %d, "limit": %d}\n' \
    "$name" $status $((SECONDS - begun)) "$limit" >> "$out/parts.jsonl"
  printf '%-22s status %-4d %4d s of %d   %s\n' "$name" $status $((SECONDS - begun)) "$limit" "$(tail -n 1 "$out/$name.log")"
  [ $status = 0 ] || failed=1
}

sanitizer() {
  command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null || echo compute-sanitizer-not-found
}

if [ $dry ]; then
  tests=(-k "triton-cpu and plain and not compile and not any_shape")
  bench=(-k "Tetrominoes and ours and forward+backward")
else
  tests=(-n 8 -k "cuda-cuda or triton-cuda")
  bench=()
fi

part machine 60 python -m bench.gpu machine "$out"
part first_results 60 python -m bench.gpu first_results "$out"
part tests 200 python -m pytest -q -p no:cacheprovider "${tests[@]}" --junitxml="$out/tests.xml" \
  tests/test_slot_attention.py tests/test_inpainting.py
if [ ! $dry ]; then
  part memcheck 60 "$(sanitizer)" --tool memcheck --error-exitcode 9 python -m bench.gpu sanitize "$out"
  part racecheck 60 "$(sanitizer)" --tool racecheck --error-exitcode 9 python -m bench.gpu sanitize "$out"
fi
part repeats 40 python -m bench.gpu repeats "$out"
part benchmarks 240 python -m pytest bench --benchmark-only -q -p no:cacheprovider "${bench[@]}" \
  --benchmark-json="$out/benchmarks.json"
part launch_settings 60 python -m bench.gpu launch_settings "$out"
python -m bench.gpu summary "$out"
exit $failed
