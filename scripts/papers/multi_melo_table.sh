#!/usr/bin/env bash
# Multi-MELO's two tables: all edits of a vision-language model, subjects of a text-to-image model; and its claims.
#
#   scripts/papers/multi_melo_table.sh           # hours on two cores, with trainings; again: goes on
#   QUICK=1 scripts/papers/multi_melo_table.sh
#   DATA=evqa scripts/papers/multi_melo_table.sh
#   SUBJECTS=dreambooth PAINTER=stable-diffusion-v1-4 scripts/papers/multi_melo_table.sh
#
# scripts/papers/common.sh says what else can be chosen; the figures and rules are in multi_melo.yaml and
# multi_melo_drawing.yaml beside it.
set -euo pipefail
source "$(dirname "$0")/common.sh"

knowledge multi_melo "mini-blip2 mini-llava" "blip2-opt-2.7b"
echo
drawing multi_melo_drawing
