#!/usr/bin/env bash
# The same run on every host of a Cloud TPU slice; JAX finds the hosts by itself (--distributed).
#
#   launch/tpu_pod.sh NAME ZONE run --config=FILE[:VARIANT] --workdir=DIR ...
#
# The repository must lie at ~/jaxsynth on each host, for example by
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command='git clone REPOSITORY ~/jaxsynth'
# and --workdir on storage that all hosts share (a mounted bucket or NFS). Started again after a
# preemption, the same command goes on where it stopped.
set -euo pipefail
if (($# < 3)); then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
# Quoted once here, because the remote shell splits the command again.
arguments=$(printf '%q ' "$@")
install='source launch/environment.sh && prepare demo &&
  "$venv/bin/pip" install --quiet "jax[tpu]==$("$venv/bin/python" -c "import jax; print(jax.__version__)")"'
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="set -e; cd ~/jaxsynth; $install; exec \"\$venv/bin/jaxsynth\" $arguments --distributed"
