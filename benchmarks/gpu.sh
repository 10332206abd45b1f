#!/usr/bin/env bash
# Is everything right on this GPU, and how fast? The CUDA tests, then measurements, then the recipe in small on FC100:
#
#   bash benchmarks/gpu.sh [DATA_DIR]       DATA_DIR has FC100; without it the recipe is left out
#
# Results go to $OUT (default checkpoint/gpu) as JSON lines and a Markdown table. A step that is done is not repeated, so the
# script can be run in parts. PYTHON chooses the interpreter, SECONDS_TO_TRAIN the time for pre-training (default 240).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out=${OUT:-checkpoint/gpu}
mkdir -p "$out"
failed=0

step() { # name, command: run once, its output kept
  local name=$1
  shift
  [ -e "$out/$name.done" ] && return
  printf '\n== %s: %s\n' "$name" "$*"
  if "$@" 2>&1 | tee "$out/$name.txt"; then touch "$out/$name.done"; else failed=1; fi
}

train() { # the time is up before the epochs are: SIGTERM then saves the state
  timeout --signal=TERM "${SECONDS_TO_TRAIN:-240}" "$python" train_pretrain.py "${common[@]}" -bs 128 -max_epoch 40 -step_size 12 \
    -num_episode 100
  local status=$?
  [ $status = 0 ] || [ $status = 124 ] || [ $status = 143 ]
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
step tests "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py
for part in solver encoder episodes fit; do step "$part" "$python" benchmarks/gpu.py "$part" -out "$out"; done
if [ -n "${1:-}" ]; then
  common=(-dataset fc100 -data_dir "$1" -amp bfloat16 -extra_dir gpu)
  step pretrain train
  best=checkpoint/pre_train/fc100/128-0.1000-12-0.20/gpu/max_acc.pth
  for head in deepemd cosine proto knn; do
    step "1shot-$head" "$python" eval.py "${common[@]}" -model_dir $best -solver simplex -head $head -test_episode 1000
  done
  step 5shot "$python" eval.py "${common[@]}" -model_dir $best -solver simplex -shot 5 -test_episode 200
  step meta "$python" train_meta.py "${common[@]}" -pretrain_dir $best -solver simplex -val_solver simplex -max_epoch 2 \
    -val_episode 100 -test_episode 500
fi
"$python" benchmarks/gpu.py table -out "$out" | tee "$out/table.md"
exit $failed
