#!/usr/bin/env bash
# The tests on a fresh machine that has Python >= 3.11 and git: makes .venv, then runs pytest.
# Without -m it leaves out the slow ones: whole runs of a method, runs that are killed or spread over
# several processes, and what compiles for some seconds. `-m slow` runs those.
#
#   launch/test.sh [PYTEST ARGUMENTS]             environment variables: launch/environment.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare test
cd "$repository"
# A process for each core, up to four: more would each compile the same programs again.
# A process takes files in the order of tests/conftest.py: those that take longest first.
exec "$venv/bin/python" -m pytest -n auto --maxprocesses=4 --dist loadfile \
  --no-loadscope-reorder -m "not slow" "$@"
