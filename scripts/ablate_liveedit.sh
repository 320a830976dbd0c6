#!/usr/bin/env bash
# What each part of LiveEdit's default is good for: 1,000 edits of EmojiKB without one of them; prints a Markdown table.
#
#   scripts/ablate_liveedit.sh                                   # three trainings, six evaluations; again: goes on
#   MODEL=mini-llava CASES=200 scripts/ablate_liveedit.sh
#
# Every row that changes the networks is trained anew, by the rule of docs/comparison.md. Runs are kept in RECORDS.
set -euo pipefail

MODEL=${MODEL:-mini-blip2}
CASES=${CASES:-1000}
RECORDS=${RECORDS:-records/ablation}

here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}  # the environment of the README, else python3
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

evaluate() {  # evaluate ROW OPTIONS...: each row in a folder of its own
    echo "$1" >&2
    "$python" -m mmedit_cli eval liveedit --model "$MODEL" --data emojikb --sequential "$CASES" --limit "$CASES" \
        --report-at "$CASES" --protocols ar,tf_liveedit --records "$RECORDS/$1" "${@:2}" >/dev/null
}

train() {  # train ROW OPTIONS...
    echo "$1: training" >&2
    "$python" -m mmedit_cli train-editor liveedit --model "$MODEL" --data emojikb --records "$RECORDS/$1" "${@:2}" >/dev/null
}

evaluate default
evaluate without-refine --set refine=0
evaluate without-training --checkpoint untrained
without() {  # without PART OPTIONS...: trained anew without it
    train "without-$1" "${@:2}"
    evaluate "without-$1" --checkpoint latest "${@:2}"
}

without naming --set naming=null
without answer_slots --set answer_slots=false
without whole_picture --set whole_picture=false
for row in default without-refine without-training without-{naming,answer_slots,whole_picture}; do
    echo "$row"
    "$python" "$here/compare_editors.py" "$RECORDS/$row"
done
