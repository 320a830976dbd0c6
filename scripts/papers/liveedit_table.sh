#!/usr/bin/env bash
# LiveEdit's table: nine editors after 1, 10, 100 and 1,000 edits in a row, beside the published figures, and its claims.
#
#   scripts/papers/liveedit_table.sh             # hours on two cores, with trainings; again: goes on
#   QUICK=1 scripts/papers/liveedit_table.sh
#   DATA=evqa MODELS=blip2-opt-2.7b scripts/papers/liveedit_table.sh
#
# scripts/papers/common.sh says what else can be chosen; scripts/papers/liveedit.yaml has the figures and the rules.
set -euo pipefail
source "$(dirname "$0")/common.sh"

knowledge liveedit "mini-blip2 mini-llava" "blip2-opt-2.7b llava-1.5-7b"
