# What the scripts of this folder share; read by them, not run. Again: goes on where it stopped.
#
#   DATA=evqa     published data (mmedit download mmedit-data); default: EmojiKB, which comes along
#   MODELS, EDITORS, COUNTS, CASES, RECORDS, DATA_OPTIONS, PYTHON      as in scripts/compare_editors.sh
#   QUICK=1       one mini model, at most 100 edits in a row and 60 cases, no training
here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-$here/../../.venv/bin/python}  # the environment of the README, else python3
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
export PYTHON=$python

QUICK=${QUICK:-}
DATA=${DATA:-emojikb}
RECORDS=${RECORDS:-records/papers${QUICK:+-quick}}

models() {  # models MINI REAL: the models to use, by the data
    if [[ -n ${MODELS:-} ]]; then echo "$MODELS"
    elif [[ $DATA != emojikb ]]; then echo "$2"
    elif [[ -n $QUICK ]]; then echo "${1%% *}"
    else echo "$1"; fi
}

knowledge() {  # knowledge PAPER MINI REAL: make the edits of a paper's table, then print it
    local counts
    counts=${COUNTS:-$("$python" "$here/table.py" "$1" --edits)}
    [[ -z $QUICK ]] || counts=${counts//1000/100}
    [[ -z $QUICK ]] || counts=$(tr ' ' '\n' <<< "$counts" | sort -nu | tr '\n' ' ')
    local chosen
    chosen=${EDITORS:-$("$python" "$here/table.py" "$1" --editors)}
    [[ -z $QUICK ]] || CASES=${CASES:-60}
    MODELS=$(models "$2" "$3") EDITORS=$chosen COUNTS=$counts CASES=${CASES:-200} DATA=$DATA RECORDS=$RECORDS \
        PROTOCOLS=ar,tf_liveedit,tf_easyedit TRAIN=${TRAIN:-$([[ -n $QUICK ]] && echo 0 || echo 1)} \
        "$here/../compare_editors.sh" >/dev/null || echo "some runs are missing" >&2
    "$python" "$here/table.py" "$1" "$RECORDS"
}

drawing() {  # drawing PAPER: let a text-to-image model learn subjects with each editor of a paper, then print its table
    local editor subjects seeds
    subjects=${CASES:-$([[ -n $QUICK ]] && echo 3 || echo 10)}
    seeds=${SEEDS:-$([[ -n $QUICK ]] && echo 2 || echo 4)}
    for editor in ${EDITORS:-$("$python" "$here/table.py" "$1" --editors)}; do
        echo "$editor, ${PAINTER:-mini-sd}" >&2
        # OPTIONS are words: options of mmedit eval
        "$python" -m mmedit_cli eval "$editor" --model "${PAINTER:-mini-sd}" --data "${SUBJECTS:-emojikb-concepts}" \
            --limit "$subjects" --set "eval.seeds=$seeds" --records "$RECORDS" ${OPTIONS:-} >/dev/null
    done
    "$python" "$here/table.py" "$1" "$RECORDS"
}
