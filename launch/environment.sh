# Sourced by the other scripts: makes a virtual environment with pinned dependencies, once.
#
#   JAXSYNTH_VENV      where the environment lies (default .venv in the repository)
#   JAXSYNTH_PYTHON    the Python to make it with (default: the first of python3.13, python3.12,
#                      python3.11, python3 and python that is at least 3.11)
#   JAXSYNTH_PIP_ARGS  more arguments for `pip install`. PyTorch, which only the tests need, comes
#                      with CUDA from PyPI on Linux; a third of the download does without:
#                      JAXSYNTH_PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JAXSYNTH_VENV:-$repository/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
# The libraries of a surrounding environment must not leak into ours.
unset PYTHONPATH PYTHONHOME

new_enough() { # PYTHON: runs and is at least 3.11 (a pyenv shim may exist and yet not run)
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Debian parts Python from its venv module, so three ways are tried: venv, virtualenv, and a venv
# that pip from outside installs pip into.
make_venv() { # PYTHON
  local log=$venv.log
  "$1" -m venv "$venv" >"$log" 2>&1 && rm -f "$log" && return
  rm -rf "$venv"
  "$1" -m virtualenv "$venv" >>"$log" 2>&1 && rm -f "$log" && return
  rm -rf "$venv"
  if command -v virtualenv >/dev/null; then
    virtualenv --python "$1" "$venv" >>"$log" 2>&1 && rm -f "$log" && return
    rm -rf "$venv"
  fi
  "$1" -m venv --without-pip "$venv" >>"$log" 2>&1 &&
    "$1" -m pip --python "$venv/bin/python" install --quiet pip >>"$log" 2>&1 &&
    rm -f "$log" && return
  rm -rf "$venv"
  return 1
}

create_environment() {
  local candidate version found="" too_old=""
  for candidate in ${JAXSYNTH_PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    command -v "$candidate" >/dev/null || continue
    if ! new_enough "$candidate"; then
      version=$("$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) &&
        too_old+="${too_old:+, }$candidate is $version"
      continue
    fi
    found=$candidate
    echo "Making $venv with $("$candidate" --version) ($(command -v "$candidate"))"
    make_venv "$candidate" && return
  done
  if [[ -z $found ]]; then
    echo "error: Python 3.11 or newer was not found${too_old:+ ($too_old)}." >&2
    echo "Install one, or name it: JAXSYNTH_PYTHON=/path/to/python3.11 $0" >&2
  else
    echo "error: $found cannot make a virtual environment:" >&2
    tail -n 5 "$venv.log" >&2
    rm -f "$venv.log"
    echo "On Debian and Ubuntu: apt install python3-venv" >&2
  fi
  exit 1
}

# Every file is compared with its hash in the lock (lock.sh). --no-deps: the lock is complete. Without
# isolation, because what pip fetches to build a package in is compared with nothing.
install_locked() { # FILE...
  local file files=()
  for file; do files+=(-r "$repository/launch/$file"); done
  # shellcheck disable=SC2086  # several arguments in one variable
  "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} \
    ${JAXSYNTH_PIP_ARGS:-} --require-hashes --no-deps --no-build-isolation "${files[@]}"
}

prepare() { # demo|test: an environment that has what it needs and this package
  local digest stamp quiet=()
  if [[ -e $venv ]] && ! new_enough "$venv/bin/python"; then
    if [[ ! -e $venv/pyvenv.cfg ]]; then
      echo "error: $venv exists and is not a virtual environment." >&2
      exit 1
    fi
    echo "$venv has no working Python 3.11 or newer; it is made again."
    rm -rf "$venv"
  fi
  [[ -e $venv ]] || create_environment

  # The stamp names all that decides what is installed; the package itself is linked, not copied.
  digest=$(cat "$repository"/launch/requirements-*.txt "$repository/pyproject.toml" \
    <(echo "$repository ${JAXSYNTH_PIP_ARGS:-}") | "$venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')
  stamp=$venv/.jaxsynth-$digest-$1
  [[ -e $stamp ]] && return
  find "$venv" -maxdepth 1 -name '.jaxsynth-*' ! -name ".jaxsynth-$digest-*" -delete
  echo "Installing what the $1 needs into $venv; the first time takes a few minutes"
  [[ -t 1 ]] || quiet=(--quiet)
  install_locked requirements-build.txt
  if [[ $1 == test ]]; then
    install_locked requirements-demo.txt requirements-test.txt
    # shellcheck disable=SC2086  # several arguments in one variable
    "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} \
      ${JAXSYNTH_PIP_ARGS:-} -r "$repository/launch/requirements-torch.txt"
  else
    install_locked requirements-demo.txt
  fi
  "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} \
    --no-deps --no-build-isolation --editable "$repository"
  touch "$stamp"
}
