#!/usr/bin/env bash
# From a fresh clone to a model that has learned something: environment, installation, the glyphs data set, the three
# stages at a small image size, and a table of what each was worth. Six to ten minutes on two cores, after installation.
set -euo pipefail
cd "$(dirname "$0")"
. ./install.sh
install requirements.txt

python=.venv/bin/python
pretrain_epochs=3 meta_epochs=3 episodes=200
common=(-dataset glyphs -image_size 32 -query 5)
run=(-extra_dir quickstart)
results=checkpoint/quickstart
log=$results/log.txt
mkdir -p $results
: >"$log"

step() { printf '\n== %s\n' "$*"; }

evaluate() { # name in the table, flags
  local name=$1
  shift
  echo "python eval.py ${common[*]} $*"
  "$python" eval.py "${common[@]}" "$@" -json "$results/$(tr -s ' ' - <<<"$name").json" | tee -a "$log"
  rows+=("$name|$(tail -n 1 "$log" | sed -E 's/.*, ([0-9]+) episodes: acc ([0-9.]+ \+- [0-9.]+ %).*/\2|\1/')")
}

rows=()
step "data: letters of five scripts, no script in two splits"
"$python" datasets/make_glyphs.py

step "stage 1: pre-train, $pretrain_epochs epochs"
"$python" train_pretrain.py "${common[@]}" "${run[@]}" -bs 32 -lr 0.01 -step_size 2 -max_epoch $pretrain_epochs -num_episode 30
pretrained=checkpoint/pre_train/glyphs/32-0.0100-2-0.20/quickstart/max_acc.pth

step "stage 2: meta-train, $meta_epochs epochs"
"$python" train_meta.py "${common[@]}" "${run[@]}" -pretrain_dir $pretrained -max_epoch $meta_epochs -val_frequency 40 \
  -lr 0.002 -step_size 2 -gamma 0.2 -val_episode 40 -test_episode 20
trained=checkpoint/glyphs/fcn/1shot-5way/quickstart/max_acc.pth

step "stage 3: evaluate on letters of scripts never seen"
evaluate "untrained     fcn      1-shot" -model_dir none -test_episode $episodes
evaluate "pre-trained   proto    1-shot" -model_dir $pretrained -test_episode $episodes -head proto
evaluate "pre-trained   fcn      1-shot" -model_dir $pretrained -test_episode $episodes
evaluate "meta-trained  proto    1-shot" -model_dir $trained -test_episode $episodes -head proto
evaluate "meta-trained  fcn      1-shot" -model_dir $trained -test_episode $episodes
evaluate "meta-trained  fcn      5-shot" -model_dir $trained -test_episode 30 -shot 5 -sfc_update_step 20
evaluate "meta-trained  grid     1-shot" -model_dir $trained -test_episode 10 -deepemd grid -patch_list 1,2
evaluate "meta-trained  sampling 1-shot" -model_dir $trained -test_episode 10 -deepemd sampling -num_patch 5

step "on the same episodes: what is lost without meta-training, without matching, and without both"
"$python" visualize.py compare -out $results $results/{meta,pre}-trained-{fcn,proto}-1-shot.json

printf '\n5-way accuracy on the test letters, with 95 %% intervals\n'
printf '%s\n' "${rows[@]}" | while IFS='|' read -r name accuracy count; do
  printf '  %-32s %18s  (%s episodes)\n' "$name" "$accuracy" "$count"
done
