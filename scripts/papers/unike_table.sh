#!/usr/bin/env bash
# UniKE's tables: one edit, and 10 and 20 in a row, beside the published figures, and its claims.
#
#   scripts/papers/unike_table.sh                # hours on two cores, with trainings; again: goes on
#   QUICK=1 scripts/papers/unike_table.sh
#   DATA=eic MODELS=minigpt4 scripts/papers/unike_table.sh
#
# scripts/papers/common.sh says what else can be chosen; scripts/papers/unike.yaml has the figures and the rules.
set -euo pipefail
source "$(dirname "$0")/common.sh"

knowledge unike "mini-blip2 mini-llava" "blip2-opt-2.7b"
