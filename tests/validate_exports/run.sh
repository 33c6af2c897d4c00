#!/usr/bin/env bash
# Makes an environment for each target under FOLDER, and has its own code read FOLDER/files.
# Usage: run.sh FOLDER PYTHON
set -euo pipefail
folder=$1 python=$2 here=$(dirname "$0")

made() {  # made NAME REQUIREMENT...: an environment, kept between runs
    local name=$1; shift
    [[ -x $folder/$name/bin/python ]] || "$python" -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install --quiet torch==2.13.0 "$@"
}

made accelerate accelerate==1.15.0
"$folder/accelerate/bin/python" "$here/accelerate_check.py" "$folder/files"

# The wheel is for Python 3.12; its Python files run under 3.11 too.
made megatron triton einops typing_extensions numpy packaging pyyaml
"$folder/megatron/bin/python" -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp --abi cp312 --platform manylinux_2_28_x86_64 \
    --dest "$folder" megatron-core==0.19.2
"$folder/megatron/bin/python" -m zipfile -e "$folder"/megatron_core-*.whl "$folder/megatron-core"
PYTHONPATH=$folder/megatron-core "$folder/megatron/bin/python" \
    "$here/megatron_check.py" "$folder/files" | tail -n 1

made deepspeed setuptools wheel psutil einops hjson msgpack ninja py-cpuinfo pydantic numpy tqdm
"$folder/deepspeed/bin/python" -m pip install --quiet --no-build-isolation --no-deps deepspeed==0.19.8
timeout 600 "$folder/deepspeed/bin/python" "$here/deepspeed_check.py" "$folder/files"
