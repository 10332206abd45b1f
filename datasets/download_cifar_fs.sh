#!/usr/bin/env bash
# CIFAR-FS, into datasets/cifar_fs/
# Usage: bash datasets/download_cifar_fs.sh [archive already downloaded, or its file:// URL]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/datasets/fetch.py" 1Lq2USoQmbFgCFJlGx3huFSfjqwtxMCL8 cifar_fs.tar "$root/datasets" cifar_fs "$@"
