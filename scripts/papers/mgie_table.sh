#!/usr/bin/env bash
# MGIE beside InstructPix2Pix: how near the edited picture is to the wanted one; and its claims.
#
#   scripts/papers/mgie_table.sh                 # again: goes on
#   QUICK=1 scripts/papers/mgie_table.sh
#   PAIRS=magicbrush/ MGIE=models/mgie-7b IP2P=instruct-pix2pix OPTIONS="--set clip=auto" scripts/papers/mgie_table.sh
#
# PAIRS are edit pairs as `mmedit eval mgie --data` takes them. scripts/papers/mgie.yaml has the figures and the rules.
set -euo pipefail
source "$(dirname "$0")/common.sh"

PAIRS=${PAIRS:-emojikb-edits:eval}
limit=${CASES:-$([[ -n $QUICK ]] && echo 200 || echo 1500)}
for editor in ${EDITORS:-$("$python" "$here/table.py" mgie --editors)}; do
    model=${MGIE:-mini-mgie}
    [[ $editor == mgie ]] || model=${IP2P:-mini-ip2p}
    echo "$editor, $model" >&2
    # OPTIONS are words: options of mmedit eval
    "$python" -m mmedit_cli eval "$editor" --model "$model" --data "$PAIRS" --limit "$limit" --records "$RECORDS" \
        ${OPTIONS:-} >/dev/null
done
"$python" "$here/table.py" mgie "$RECORDS"
