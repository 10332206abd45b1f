#!/usr/bin/env bash
# CUB-200-2011, cut to its bounding boxes, into datasets/cub/
# Usage: bash datasets/download_cub.sh [archive already downloaded, or its file:// URL]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/datasets/fetch.py" 1B8jmZin9teye7Lte9ZKsQ3lyMASbxune cub.tar "$root/datasets" cub "$@"
