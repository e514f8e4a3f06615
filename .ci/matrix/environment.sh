#!/usr/bin/env bash
# An environment that a wheel is tried in, with one release of torch and without CUDA: environment.sh FOLDER 2.14.1
# [PYTHON]. On disk, in MB: 1130 with 2.13.0+cpu, 1560 with 2.14.1, 2140 with 2.10.0, of which all but 380 are torch.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1 torch=$2
"${3:-python3.11}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
"$folder/bin/python" -m pip install --quiet --no-deps --no-cache-dir "torch==$torch"
case $torch in
  *+cpu) ;;
  *) "$folder/bin/python" "$here/cuda_stubs.py" "$(echo "$folder"/lib/python3*/site-packages/torch)" ;;
esac
"$folder/bin/python" -c "import torch; print(torch.__version__, torch.ones(3).sum())"
