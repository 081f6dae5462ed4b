#!/usr/bin/env bash
# The same run by several processes of this machine, as a cluster would start it: for trying a
# multi-process run on CPU, or one process per GPU. Stops them all when one fails.
#
#   launch/processes.sh N run --config=FILE[:VARIANT] --workdir=DIR ...
set -euo pipefail
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]] || (($# < 2)); then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
count=$1
shift
export JAX_NUM_PROCESSES=$count
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-localhost:$((20000 + RANDOM % 20000))}

children=()
trap 'kill "${children[@]}" 2>/dev/null || true' EXIT
for ((index = 0; index < count; index++)); do
  JAX_PROCESS_ID=$index "$venv/bin/jaxsynth" "$@" &
  children+=($!)
done
for ((index = 0; index < count; index++)); do
  wait -n || exit $?
done
