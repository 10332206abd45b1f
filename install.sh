# Sourced by quickstart.sh and tests/run.sh, from the root of the project: creates .venv and installs the requirements files given
# as arguments, again only if their content has changed. PYTHON chooses the interpreter.

install() {
  local stamp=.venv/installed-from
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
      echo "error: Python 3.10 to 3.12 is needed, and $python is $("$python" -V 2>&1). Choose another: PYTHON=python3.11 bash $0" >&2
      return 1
    }
    echo "creating .venv with $("$python" -V)"
    rm -rf .venv
    "$python" -m venv .venv || return 1
  fi
  local file fresh=yes
  for file in "$@"; do
    cmp -s "$file" "$stamp-${file//\//-}" || fresh=no
  done
  [ "$fresh" = yes ] && return 0
  [ -e "$stamp-$1" ] || df -Pk . | awk 'NR == 2 && $4 < 7e6 { printf "warning: %.1f GB of disk space are free; .venv needs " \
    "about 7 GB, or 1 GB with a CPU build of PyTorch\n", $4 * 1024 / 1e9 }' >&2 || true
  echo "installing $* into .venv (takes minutes the first time)"
  # shellcheck disable=SC2046 # one -r per file, and no file name has a space
  .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || return 1
  .venv/bin/python -m pip check --disable-pip-version-check || return 1
  for file in "$@"; do
    cp "$file" "$stamp-${file//\//-}"
  done
}
