# Sourced by the other scripts: creates .venv next to the README if necessary, and activates it.
# Needs Python 3.11 or newer; set PYTHON to choose one. Changes nothing outside of .venv.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "Python 3.11 or newer is required, but '$python' is not: set PYTHON=/path/to/python3.11." >&2
  exit 1
fi

stamp=.venv/installed
if [[ ! -f $stamp || pyproject.toml -nt $stamp ]]; then
  echo "installing into .venv (once; takes about two minutes)"
  "$python" -m venv .venv
  .venv/bin/python -m pip install -qq --upgrade pip
  .venv/bin/python -m pip install -qq --editable '.[emoji]' --group dev
  touch "$stamp"
fi
source .venv/bin/activate

install_extra() { # NAME...: installs extras of pyproject.toml, once
  local names stamp
  names=$(IFS=, && echo "$*")
  stamp=.venv/installed-$names
  if [[ ! -f $stamp || pyproject.toml -nt $stamp ]]; then
    echo "installing the extras $names into .venv (once)"
    python -m pip install -qq --editable ".[$names]"
    touch "$stamp"
  fi
}
