#!/usr/bin/env bash
# All that there is to learn from a GPU, the cheapest proof first, within ten minutes:
#
#     bench/gpu.sh FOLDER [PART...]            on the first CUDA device
#     bench/gpu.sh --dry-run FOLDER [PART...]  the same at toy sizes in Triton's interpreter: does the script itself work?
#
# Parts, all of them unless some are named: machine build accuracy tests memcheck racecheck repeats benchmarks
# launch_settings training. The last takes what time there is; IIO_KERNELS_TRAINING=FOLDER/training.tar.gz of an earlier
# call goes on from there. Each part has a time limit and leaves its results in FOLDER before the next begins; none begins
# after the ten minutes. Whatever became of them, FOLDER/summary.json says what ran, for how long, and how it ended. Exit
# status 0: every part ended well.
set -uo pipefail
cd "$(dirname "$0")/.."

dry= slack=1
if [ "${1:-}" = --dry-run ]; then
  dry=1 slack=5  # times the limits, for a slow machine
  export TRITON_INTERPRET=1 IIO_KERNELS_BENCH_SIZES=toy
  shift
fi
known=" machine build accuracy tests memcheck racecheck repeats benchmarks launch_settings training "
if [ $# = 0 ] || [[ $1 == -* ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
parts=" ${*:-$known} "
for name in $parts; do
  if [[ $known != *" $name "* ]]; then
    echo "there is no part $name, only:$known" >&2
    exit 2
  fi
done
python=${PYTHON:-python3}
if [ ! $dry ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "there is no GPU that PyTorch can use: --dry-run needs none" >&2
  exit 2
fi
export IIO_KERNELS_COMMIT=${IIO_KERNELS_COMMIT:-$(git rev-parse HEAD 2> /dev/null)}
export PYTHONUNBUFFERED=1
deadline=$((SECONDS + ${IIO_KERNELS_GPU_SECONDS:-$((580 * slack))}))
failed=0
: > "$out/parts.jsonl"
: > "$out/log.txt"

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$(($2 * slack)) begun=$SECONDS status=0 log
  shift 2
  [[ $parts == *" $name "* ]] || return 0
  if ((limit > deadline - SECONDS)); then limit=$((deadline - SECONDS)); fi
  if ((limit < 5)); then
    status=124 limit=0
  else
    log=$(mktemp)
    LIMIT=$limit timeout --signal=INT --kill-after=10 "$limit" "$@" > "$log" 2>&1 || status=$?
    { echo "=== $name"; cat "$log"; } >> "$out/log.txt"
    tail -n "${LINES_SHOWN:-12}" "$log"
    rm -f "$log"
  fi
  printf '{"part": "%s", "status": %d, "seconds": %d, "limit": %d}\n' \
    "$name" $status $((SECONDS - begun)) "$limit" >> "$out/parts.jsonl"
  echo "--- $name: status $status, $((SECONDS - begun)) s of $limit"
  [ $status = 0 ] || failed=1
}

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ $dry ]; then
  races=(-k "backward or train")
  tests=(-k "triton-cpu and plain and not compile and not any_shape and not gradcheck")
else
  races=()
  # Not those of any shape, each of which is a kernel to compile.
  tests=(-n 14 -k "(triton-cuda or cuda-cuda or test_gpu) and not any_shape")
fi

part machine 60 "$python" -m bench.gpu machine "$out"
part build 150 "$python" -m bench.gpu build "$out"
part accuracy 120 "$python" -m bench.gpu accuracy "$out"
part tests 200 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" --junitxml="$out/tests.xml" \
  tests/test_gpu.py tests/ops/test_broadcast_conv2d*.py tests/ops/test_compose.py tests/ops/test_iio_loss.py \
  tests/ops/test_sampled_subsets.py tests/ops/test_slot_attention*.py \
  tests/ops/test_spatial_mixture.py
if [ $dry ]; then
  part memcheck 60 "$python" -m bench.gpu sanitize "$out"
else
  part memcheck 60 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" -m bench.gpu sanitize "$out"
  part racecheck 60 "$sanitizer" --tool racecheck --error-exitcode 9 "$python" -m bench.gpu sanitize "$out"
fi
part repeats 40 "$python" -m bench.gpu repeats "$out"
LINES_SHOWN=150 part benchmarks 240 "$python" -m pytest bench "${races[@]}" --benchmark-only -q -p no:cacheprovider \
  --benchmark-quiet  --seconds=$((210 * slack)) --benchmark-json="$out/benchmarks.json"
part launch_settings 90 "$python" -m bench.gpu launch_settings "$out"
part training 580 "$python" -m bench.gpu training "$out"
"$python" -m bench.gpu summary "$out"
exit $failed
