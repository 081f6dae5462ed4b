#!/usr/bin/env bash
# The main job on a fresh machine that has Python >= 3.11 and git: makes .venv, then runs DataDream
# on scikit-learn's handwritten digits with the base model in this repository. On two CPU cores it
# ends in six to twelve minutes with a table and runs/demo/report.html; started again, it goes on.
#
#   launch/demo.sh [--config.FIELD=VALUE ...]     environment variables: launch/environment.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare demo
cd "$repository"
# A step on a CPU allocates its intermediate values as one block, and glibc would give it back each
# time: faulting it in again takes a fifth of a large step. Only the first arena keeps any size.
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:--1}
exec "$venv/bin/jaxsynth" run --config=configs/datadream.py:tiny --workdir=runs/demo "$@"
