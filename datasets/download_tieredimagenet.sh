#!/usr/bin/env bash
# tieredImageNet at 224 pixels, into datasets/tiered_imagenet/
# Usage: bash datasets/download_tieredimagenet.sh [archive already downloaded, or its file:// URL]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/datasets/fetch.py" 1ANczVwnI1BDHIF65TgulaGALFnXBvRfs tieredimagenet.tar "$root/datasets" tiered_imagenet,tieredimagenet "$@"
