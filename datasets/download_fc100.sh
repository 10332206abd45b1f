#!/usr/bin/env bash
# FC100, into datasets/FC100/
# Usage: bash datasets/download_fc100.sh [archive already downloaded, or its file:// URL]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/datasets/fetch.py" 1nEh3O2RJ5zTbWj7luyQCNcklpX0_5KlS FC100.tar "$root/datasets" FC100,fc100 "$@"
