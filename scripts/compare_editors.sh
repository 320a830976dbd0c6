#!/usr/bin/env bash
# Compare the editors on EmojiKB, after 1, 10, 20, 100 and 1,000 edits in a row; prints a Markdown table.
#
#   scripts/compare_editors.sh                                    # all: hours on two cores; again: goes on
#   MODELS=mini-blip2 EDITORS="ft liveedit" COUNTS="1 10" scripts/compare_editors.sh
#
# CASES is how many edits are judged up to 100 in a row (1,000 are judged after 1,000). Runs are kept in RECORDS.
# EDITOR+KEY=VALUE changes a hyper-parameter; EDITOR+paper is the published form. An editor that must be trained, and for
# which no networks come along, is trained first, or with TRAIN=0 left out. DATA and DATA_OPTIONS ("--images coco --subset
# clean") say what is edited. An editor that fails is named, and the others go on.
set -euo pipefail

MODELS=${MODELS:-"mini-blip2 mini-llava"}
EDITORS=${EDITORS:-"ft ft+target=connector lora ike t-patcher grace wise m-ore unike ultraedit memit alphaedit multi-melo liveedit liveedit+paper"}
COUNTS=${COUNTS:-"1 10 20 100 1000"}
CASES=${CASES:-200}
RECORDS=${RECORDS:-records/compare}
DATA=${DATA:-emojikb}
DATA_OPTIONS=${DATA_OPTIONS:-}
PROTOCOLS=${PROTOCOLS:-ar,tf_liveedit}
TRAIN=${TRAIN:-1}

here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}  # the environment of the README, else python3
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
failed=""

options_of() {  # options_of EDITOR: where its runs are kept, and what is changed, in the array `options`
    options=(--records "$RECORDS")
    local change
    for change in ${1//+/ }; do
        case $change in
            paper) options=(--records "$RECORDS/paper") ;;
            *=*) options+=(--set "$change") ;;
        esac
    done
}

trained() {  # trained EDITOR MODEL: make sure that there are networks, and say in `networks` which to take
    networks=()
    local name=${1%%+*}
    local training=(train-editor "$name" --model "$2" --data "$DATA")
    if [[ $1 == *+paper ]]; then  # the published form is trained as such
        training+=(--records "$RECORDS/paper" --set variant=paper --set answer_slots=false --set refine=0)
        training+=(--set training.steps="${STEPS:-20000}" --set training.patience=5)  # the most; see docs/comparison.md
    elif [[ " $learners " != *" $name "* || -f $here/../data/editors/$name/$2.safetensors ]]; then
        return 0
    else
        training+=(--records "$RECORDS")
        [[ -z ${STEPS:-} ]] || training+=(--set training.steps="$STEPS")
        networks=(--checkpoint latest)
    fi
    if [[ $TRAIN == 0 ]]; then
        echo "$2, $1: left out, no networks come along (TRAIN=0)" >&2
        return 1
    fi
    # shellcheck disable=SC2086  # DATA_OPTIONS are words
    "$python" -m mmedit_cli "${training[@]}" $DATA_OPTIONS >/dev/null || {
        failed+=" $2/$1/training"
        return 1
    }
}

learners=$("$python" -c "
from mmedit_cli.registry import editors
print(*[name for name in editors.names() if editors.fact(name, 'trains')])")
for model in $MODELS; do
    for editor in $EDITORS; do
        trained "$editor" "$model" || continue
        for count in $COUNTS; do
            options_of "$editor"
            options+=(--model "$model" --data "$DATA" --sequential "$count" --report-at "$count" --protocols "$PROTOCOLS")
            options+=(--limit $((count > CASES ? count : CASES)) ${networks[@]+"${networks[@]}"})
            echo "$model, $editor, $count in a row" >&2
            # shellcheck disable=SC2086
            "$python" -m mmedit_cli eval "${editor%%+*}" "${options[@]}" $DATA_OPTIONS >/dev/null \
                || failed+=" $model/$editor/$count"
        done
    done
done
"$python" "$here/compare_editors.py" "$RECORDS"
[[ -z $failed ]] || {
    echo "failed:$failed; the same command tries them again" >&2
    exit 1
}
