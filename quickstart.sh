#!/usr/bin/env bash
# From a fresh clone to a model that has learned something: environment, installation, the glyphs data set, the three
# stages at a small image size, and a table of what each of them contributes. Three to ten minutes on two cores, after installation.
set -euo pipefail
cd "$(dirname "$0")"
. ./install.sh
install requirements.txt

python=.venv/bin/python
common=(-dataset glyphs -image_size 32 -query 5)
run=(-extra_dir quickstart)
results=checkpoint/quickstart
mkdir -p $results

step() { printf '\n== %s\n' "$*"; }

names=() files=()
evaluate() { # name in the table, flags
  local file="$results/${1// /-}.json"
  names+=("$1") files+=("$file")
  echo "python eval.py ${common[*]} ${*:2}"
  "$python" eval.py "${common[@]}" "${@:2}" -json "$file"
}

step "data: letters of five scripts, no script in two splits"
"$python" datasets/make_glyphs.py

step "stage 1: pre-train"
"$python" train_pretrain.py "${common[@]}" "${run[@]}" -bs 32 -lr 0.01 -step_size 2 -max_epoch 2 -num_episode 30
pretrained=checkpoint/pre_train/glyphs/32-0.0100-2-0.20/quickstart

step "stage 2: meta-train"
"$python" train_meta.py "${common[@]}" "${run[@]}" -pretrain_dir $pretrained -max_epoch 3 -val_frequency 40 \
  -lr 0.002 -step_size 2 -gamma 0.2 -val_episode 40 -test_episode 20
trained=checkpoint/glyphs/fcn/1shot-5way/quickstart

step "stage 3: evaluate on letters of scripts never seen"
evaluate "meta-trained deepemd" -model_dir $trained -test_episode 200
evaluate "meta-trained proto" -model_dir $trained -test_episode 200 -head proto
evaluate "meta-trained knn" -model_dir $trained -test_episode 200 -head knn
evaluate "pre-trained deepemd" -model_dir $pretrained -test_episode 200
evaluate "pre-trained proto" -model_dir $pretrained -test_episode 200 -head proto
evaluate "untrained deepemd" -model_dir none -test_episode 200
evaluate "meta-trained 5-shot" -model_dir $trained -test_episode 30 -shot 5 -sfc_update_step 20
evaluate "meta-trained grid" -model_dir $trained -test_episode 10 -deepemd grid -patch_list 1,2
evaluate "meta-trained sampling" -model_dir $trained -test_episode 10 -deepemd sampling -num_patch 5

step "5-way accuracy on the test letters, with 95 % intervals"
"$python" visualize.py compare "${files[@]}" -names "$(IFS=,; echo "${names[*]}")" -out $results
