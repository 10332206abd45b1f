#!/usr/bin/env bash
# The figures on FC100 in docs/results.md: two to three hours on two cores. Needs datasets/FC100 (python datasets/prepare.py fc100).
# If interrupted, start it again: it resumes. Tables are printed; checkpoint/fc100-figures/ keeps them and the accuracy of every episode.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
data=(-dataset fc100 -image_size 32)
pretrained=checkpoint/pre_train/fc100/64-0.0500-2-0.20
figures=checkpoint/fc100-figures
mkdir -p "$figures"

evaluate() { # name, flags
  "$python" eval.py "${data[@]}" -solver simplex -resume -extra_dir "fc100-$1" -json "$figures/$1.json" "${@:2}"
}

"$python" train_pretrain.py "${data[@]}" -solver simplex -bs 64 -lr 0.05 -max_epoch 4 -step_size 2 -resume
[ -s "$figures/heads.md" ] ||
  "$python" benchmarks/heads.py "${data[@]}" -solver simplex -model_dir $pretrained -norms center -kshots mean,sfc \
    -json "$figures/heads.json" >"$figures/heads.md"
cat "$figures/heads.md"

for shot in 1 5; do
  settings=(-model_dir $pretrained -shot $shot -test_episode $((shot == 1 ? 600 : 200)))
  evaluate fcn-$shot "${settings[@]}"
  evaluate pyramid-$shot "${settings[@]}" -feature_pyramid 1
  evaluate grid-$shot "${settings[@]}" -deepemd grid -patch_list 1,2
  "$python" visualize.py compare -out "$figures/$shot-shot" "$figures"/{fcn,pyramid,grid}-$shot.json
done
for seed in 1 2 3; do
  for solver in simplex opencv; do
    "$python" train_meta.py "${data[@]}" -solver $solver -seed $seed -extra_dir $solver-$seed -pretrain_dir $pretrained -lr 0.002 \
      -max_epoch 2 -step_size 1 -gamma 0.2 -val_frequency 60 -val_episode 60 -test_episode 20 -resume
    evaluate $solver-$seed -model_dir checkpoint/fc100/fcn/1shot-5way/$solver-$seed -test_episode 600
  done
done

"$python" visualize.py compare -out "$figures/meta-trained" "$figures"/{fcn-1,{simplex,opencv}-{1,2,3}}.json
for seed in 1 2 3; do
  "$python" visualize.py compare -out "$figures/seed-$seed" "$figures"/{opencv,simplex}-$seed.json
done
