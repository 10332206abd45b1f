#!/usr/bin/env bash
# Is everything right on this GPU, and how fast? The CUDA tests, then measurements, then the recipe in small on FC100:
#
#   bash benchmarks/gpu.sh [-data_dir DIR]       DIR has FC100; without it the recipe is left out
#   bash benchmarks/gpu.sh -gpu cpu -quick       tries the same without a GPU, but for the CUDA tests
#
# A call ends after $LIMIT seconds (480) and does what earlier calls have not done: with the recipe, two or three calls do all.
# Results go to $OUT (checkpoint/gpu), as JSON lines and as Markdown in table.md. $PYTHON is the interpreter, $SECONDS_TO_TRAIN
# the time for pre-training (240).
set -uo pipefail
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
data_dir='' gpu=() few=''
while [ $# -gt 0 ]; do
  case $1 in
    -h) usage && exit ;;
    -quick) few=4 ;;
    -gpu) gpu=(-gpu "${2-}") && shift ;;
    -data_dir) data_dir=${2-} && shift ;;
    -*) usage >&2 && exit 2 ;;
    *) data_dir=$1 ;;
  esac
  shift
done
data_dir=${data_dir:+$(realpath -m "$data_dir")}
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out=${OUT:-checkpoint/gpu${few:+-quick}} limit=${LIMIT:-480} begun='' failed=() later=()
mkdir -p "$out" || exit
trap 'exit 130' INT # Python handles it, after which bash would go on

step() { # name, the seconds it takes, command: run once, if there is time; ended at the limit, it is done if $enough exists
  local name=$1 needed=$2 left=$((limit - SECONDS)) status
  shift 2
  [ -e "$out/$name.done" ] && return
  if [ "$begun" ] && [ $left -lt "$needed" ]; then later+=("$name") && return; fi
  begun=1
  printf '\n== %s: %s\n' "$name" "$*"
  timeout --foreground --kill-after=20 $left "$@" 2>&1 | tee -i "$out/$name.txt"
  status=${PIPESTATUS[0]}
  if [ "$status" = 0 ] || { [ "$status" = 124 ] && [ -e "${enough-}" ]; }; then
    touch "$out/$name.done"
  elif [ "$status" = 124 ]; then
    later+=("$name")
  else
    failed+=("$name")
  fi
}

measure=("$python" benchmarks/gpu.py -out "$out" "${gpu[@]}" ${few:+-quick})
"${measure[@]}" device || exit
[ "${gpu[1]-}" = cpu ] || step tests 150 "$python" -m pytest -q -o cache_dir="$out/pytest" --lf tests/test_cuda.py
step solver 30 "${measure[@]}" solver
step encoder 90 "${measure[@]}" encoder
step episodes 40 "${measure[@]}" episodes
step fit 40 "${measure[@]}" fit
if [ "$data_dir" ]; then
  common=(-dataset fc100 -data_dir "$data_dir" -solver simplex -amp bfloat16 "${gpu[@]}")
  [ -z "$few" ] || common+=(-amp off -image_size 16)
  best=checkpoint/pre_train/fc100/128-0.1000-12-0.20/gpu/max_acc.pth train=${SECONDS_TO_TRAIN:-240}
  started=$([ -e "$out/pretrain.txt" ] && echo -resume)
  end=$((SECONDS + train < limit ? SECONDS + train : limit))
  limit=$end enough=$best step pretrain "$train" "$python" train_pretrain.py "${common[@]}" -extra_dir gpu $started -bs 128 \
    -max_epoch 40 -step_size 12 -num_episode "${few:-100}"
  if [ -e "$out/pretrain.done" ]; then
    step heads 90 "$python" benchmarks/heads.py "${common[@]}" -model_dir $best -heads deepemd,cosine,proto,knn -norms center \
      -episodes "${few:-1000},${few:-200}" -json "$out/heads.json"
    step meta 90 "$python" train_meta.py "${common[@]}" -extra_dir gpu -pretrain_dir $best -val_solver simplex -max_epoch 2 \
      -val_frequency "${few:-50}" -val_episode "${few:-100}" -test_episode "${few:-500}"
  fi
fi

{
  "${measure[@]}" table
  printf '\n'
  grep -hs '^|' "$out/heads.txt"
  grep -hs '^test, ' "$out/meta.txt"
  tail -qn 1 "$out/tests.txt" 2>/dev/null
} | tee "$out/table.md"
[ ${#later[@]} = 0 ] || echo "The time is up; to continue, run the same command again. Left: ${later[*]}"
[ ${#failed[@]} = 0 ] || { echo "Failed: ${failed[*]}. Their output is in $out/*.txt; the next call repeats them" && exit 1; }
