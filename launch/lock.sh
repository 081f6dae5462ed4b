#!/usr/bin/env bash
# Writes the lock files that demo.sh and test.sh install: requirements-{build,demo,test}.txt, every
# package of every dependency with its version and the SHA-256 of each of its files on PyPI, for any
# platform and Python 3.11 or newer. Versions that the files have are kept; --upgrade, or
# --upgrade-package NAME, takes newer ones. Run the tests on 3.11 and on 3.13 before committing them.
#
#   launch/lock.sh [--upgrade | --upgrade-package NAME]        needs uv (pip install uv)
#
# PyTorch stands in requirements-torch.txt with its version alone: it comes from PyPI with CUDA, or
# from an index of its own (JAXSYNTH_PIP_ARGS), whose files are others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=launch/requirements-build.txt demo=launch/requirements-demo.txt
test=launch/requirements-test.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

compile() { # ARGUMENTS of `uv pip compile`
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --custom-compile-command launch/lock.sh "$@" >/dev/null
}
names() { # FILE...: of its packages
  sed -n 's/^\([a-z0-9][a-z0-9._-]*\)==.*/\1/p' "$@" | sort -u
}

echo 'setuptools>=77' >"$scratch/build.in" # builds this package, and those without wheels
printf '%s\n' codespell pyrefly ruff >"$scratch/tools.in" # what .ci/run checks the sources with
compile "$scratch/build.in" -o "$build" "$@"
compile pyproject.toml -c "$build" --no-emit-package setuptools -o "$demo" "$@"
wanted=(pyproject.toml "$scratch/tools.in" --extra test -c "$build" -c "$demo" "$@")
cp "$test" "$scratch/all.txt"
compile "${wanted[@]}" -o "$scratch/all.txt"
skipped=()
for name in $(names "$build" "$demo") \
  $(names "$scratch/all.txt" | grep -E '^(torch|triton|nvidia-.*|cuda-.*)$'); do
  skipped+=(--no-emit-package "$name")
done
compile "${wanted[@]}" "${skipped[@]}" -o "$test"
{
  echo '# PyTorch, the oracle of the parity tests. launch/lock.sh writes this; it says why no hashes.'
  grep -o '^torch==[0-9.]*' "$scratch/all.txt"
} >launch/requirements-torch.txt
