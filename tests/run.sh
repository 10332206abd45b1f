#!/usr/bin/env bash
# Environment, installation, then lint and all tests, the slow ones included, in two processes. Arguments go to pytest, which
# then runs in one.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./install.sh
install requirements.txt requirements-data.txt tests/requirements.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
for script in *.sh benchmarks/*.sh tests/*.sh .ci/run; do bash -n "$script"; done
if [ $# = 0 ]; then
  export OMP_NUM_THREADS=1
  set -- -n 2 --dist worksteal
fi
exec .venv/bin/python -m pytest "$@"
