#!/usr/bin/env bash
# Compare the editors on EmojiKB, after 1, 10, 20, 100 and 1,000 edits in a row; prints a Markdown table.
#
#   scripts/compare_editors.sh                                    # all: hours on two cores; again: goes on
#   MODELS=mini-blip2 EDITORS="ft liveedit" COUNTS="1 10" scripts/compare_editors.sh
#
# CASES is how many edits are judged up to 100 in a row (1,000 are judged after 1,000). Runs are kept in RECORDS.
set -euo pipefail

MODELS=${MODELS:-"mini-blip2 mini-llava"}
EDITORS=${EDITORS:-"ft ft+target=connector lora ike t-patcher grace wise m-ore unike ultraedit memit alphaedit multi-melo liveedit liveedit+paper"}
COUNTS=${COUNTS:-"1 10 20 100 1000"}
CASES=${CASES:-200}
RECORDS=${RECORDS:-records/compare}

here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}  # the environment of the README, else python3
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
for model in $MODELS; do
    for editor in $EDITORS; do
        if [[ $editor == *+paper ]]; then  # the published form is trained as such
            "$python" -m mmedit_cli train-editor "${editor%+paper}" --model "$model" --data emojikb --records "$RECORDS/paper" \
                --set variant=paper --set answer_slots=false --set refine=0 \
                --set training.steps="${STEPS:-20000}" --set training.patience=5 >/dev/null  # the most; see docs/comparison.md
        fi
        for count in $COUNTS; do
            options=(--model "$model" --data emojikb --sequential "$count" --report-at "$count" --protocols ar,tf_liveedit)
            options+=(--limit $((count > CASES ? count : CASES)))
            case $editor in
                *+paper) options+=(--records "$RECORDS/paper") ;;
                *+*) options+=(--records "$RECORDS" --set "${editor#*+}") ;;
                *) options+=(--records "$RECORDS") ;;
            esac
            echo "$model, $editor, $count in a row" >&2
            "$python" -m mmedit_cli eval "${editor%%+*}" "${options[@]}" >/dev/null
        done
    done
done
"$python" "$here/compare_editors.py" "$RECORDS"
