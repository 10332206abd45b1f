#!/usr/bin/env bash
# miniImageNet, into datasets/miniimagenet/
# Usage: bash datasets/download_miniimagenet.sh [archive already downloaded, or its file:// URL]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/datasets/fetch.py" 191cFzwwNTzG_mHUDABF0Nh77cI6pa-qq miniimagenet.tar "$root/datasets" miniimagenet "$@"
