#!/usr/bin/env bash
# Download the published meta-trained models to deepemd_trained_model/<dataset>/<variant>/max_acc.pth
# Usage: bash download_trained_model.sh [archive already downloaded, or its file:// URL]
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/datasets/fetch.py" trained_model "$@"
