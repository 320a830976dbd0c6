#!/usr/bin/env bash
# Perfusion beside DreamBooth: how well a subject and a prompt are drawn, what a concept weighs; and its claims.
#
#   scripts/papers/perfusion_table.sh            # again: goes on
#   QUICK=1 scripts/papers/perfusion_table.sh
#   SUBJECTS=dreambooth PAINTER=stable-diffusion-v1-5 scripts/papers/perfusion_table.sh
#
# scripts/papers/common.sh says what else can be chosen; scripts/papers/perfusion.yaml has the rules.
set -euo pipefail
source "$(dirname "$0")/common.sh"

drawing perfusion
