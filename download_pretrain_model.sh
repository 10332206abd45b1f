#!/usr/bin/env bash
# Download the published pre-trained encoders to deepemd_pretrain_model/<dataset>/resnet12/max_acc.pth
# Usage: bash download_pretrain_model.sh [archive already downloaded, or its file:// URL]
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/datasets/fetch.py" pretrain_model "$@"
