#!/usr/bin/env bash
# bench/gpu.sh [ROW...]: the GPU column of docs/benchmarks.md, all rows but 6, or those that are named by number.
#
# For a machine with a GPU, torch and transformers of its own, and no network: nothing is downloaded. What PEFT and TRL
# need may lie as wheels in ./wheels; a row whose peer can be had neither there nor from the machine says so and is not
# ok. Each row is a call of at most 9 minutes (LIMIT_SECONDS); results go to bench/results, the lines of the calls to
# the screen. The exit code is 0 when every row was measured, at its bar or not.

set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
LIMIT_SECONDS=${LIMIT_SECONDS:-540}
ROWS=(1 2 3 4 5 7 8 9 10 11 12 13)
declare -A NAME=(
  [1]=step_flops [2]=step_speed [3]=step_vs_peft [4]=many_runs [5]=rl_vs_trl [7]=slot_memory [8]=mixed_adapters
  [9]=generate_vs_peft [10]=admission [11]=version_to_sampler [12]=checkpoint_stall [13]=long_sequences
)

PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# Wheels go into a folder of their own at the end of the path: what the machine has comes first.
if compgen -G 'wheels/*.whl' > /dev/null; then
  echo "unpacking $(compgen -G 'wheels/*.whl' | wc -l) wheels into outputs/bench/wheels"
  rm -rf outputs/bench/wheels
  if ! "$PYTHON" -m pip install --quiet --no-index --no-deps --target outputs/bench/wheels wheels/*.whl; then
    echo "the wheels cannot be unpacked; rows that need PEFT or TRL will say that it is missing" >&2
  fi
  PYTHONPATH=$PYTHONPATH:$PWD/outputs/bench/wheels
fi

asked=("$@")
[ ${#asked[@]} -gt 0 ] || asked=("${ROWS[@]}")
for row in "${asked[@]}"; do
  if [ -z "${NAME[$row]:-}" ]; then
    echo "there is no row $row on a GPU; there are ${ROWS[*]}" >&2
    exit 2
  fi
done

failed=()
for row in "${asked[@]}"; do
  echo "== row $row: ${NAME[$row]}"
  began=$SECONDS
  timeout --kill-after=15 "$LIMIT_SECONDS" "$PYTHON" -m "bench.${NAME[$row]}" --device cuda
  code=$?
  if [ $code -eq 124 ] || [ $code -eq 137 ]; then
    echo "row $row: not done within $LIMIT_SECONDS s" >&2
  fi
  [ $code -eq 0 ] || failed+=("$row")
  echo "== row $row: exit code $code after $((SECONDS - began)) s"
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "not measured: ${failed[*]}" >&2
  exit 1
fi
