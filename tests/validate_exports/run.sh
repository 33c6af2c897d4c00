#!/usr/bin/env bash
# Makes an environment for each target under FOLDER, has its own code read FOLDER/files, and has
# those that can train on a CPU run two steps of FOLDER/two-steps.
# Usage: run.sh FOLDER PYTHON
set -euo pipefail
folder=$(realpath "$1") python=$2 here=$(realpath "$(dirname "$0")")
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

made() {  # made NAME REQUIREMENT...: an environment, kept between runs
    local name=$1; shift
    [[ -x $folder/$name/bin/python ]] || "$python" -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install --quiet "$@"
}
trained() {  # trained NAME COMMAND...: in the folder of each case, with the programs of NAME first
    local name=$1; shift
    for each in "$folder/two-steps/$name"/*/; do
        (cd "$each" && PATH=$folder/$name/bin:$PATH PYTHONPATH=$each:$folder/megatron-core \
            "$@" . 2>log.txt) \
            || { tail -n 30 "$each/log.txt" >&2; exit 1; }
    done
}

made accelerate torch==2.13.0 accelerate==1.15.0 transformers==5.23.0
"$folder/accelerate/bin/python" "$here/accelerate_check.py" "$folder/files"
trained accelerate bash launch.sh "$here/accelerate_train.py"

made torchtitan torch==2.14.1 torchtitan==0.3.0 triton
"$folder/torchtitan/bin/python" "$here/torchtitan_check.py" "$folder/files" | tail -n 1
trained torchtitan torchrun --nproc-per-node=4 "$here/torchtitan_train.py" | grep "two steps"

# The wheel is for Python 3.12; its Python files run under 3.11 too.
made megatron torch==2.13.0 triton einops typing_extensions numpy packaging pyyaml safetensors
"$folder/megatron/bin/python" -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp --abi cp312 --platform manylinux_2_28_x86_64 \
    --dest "$folder" megatron-core==0.19.2
"$folder/megatron/bin/python" -m zipfile -e "$folder"/megatron_core-*.whl "$folder/megatron-core"
PYTHONPATH=$folder/megatron-core "$folder/megatron/bin/python" \
    "$here/megatron_check.py" "$folder/files" | tail -n 1
trained megatron torchrun --nproc-per-node=4 "$here/megatron_train.py" | grep "two steps"

made deepspeed torch==2.13.0 setuptools wheel psutil einops hjson msgpack ninja py-cpuinfo pydantic numpy tqdm
"$folder/deepspeed/bin/python" -m pip install --quiet --no-build-isolation --no-deps deepspeed==0.19.8
timeout 600 "$folder/deepspeed/bin/python" "$here/deepspeed_check.py" "$folder/files"

# These are read and not imported: they need a GPU, or dozens of packages.
unpacked() {  # unpacked NAME VERSION PYTHON
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$3" \
        --dest "$folder" "$1==$2"
    "$python" -m zipfile -e "$folder/${1//-/_}-$2"-*.whl "$folder/$1-source"
}
unpacked llamafactory 0.9.5 3.11
"$folder/accelerate/bin/python" "$here/llamafactory_check.py" "$folder/files" "$folder/llamafactory-source"
unpacked axolotl 0.19.0 3.11
"$folder/accelerate/bin/python" -m pip install --quiet pydantic
"$folder/accelerate/bin/python" "$here/axolotl_check.py" "$folder/files" "$folder/axolotl-source"
unpacked megatron-bridge 0.6.2 3.12
"$python" "$here/bridge_check.py" "$folder/files" "$folder/megatron-bridge-source" "$folder/megatron-core"

[[ -x $folder/jobs/bin/python ]] || "$python" -m venv "$folder/jobs"
"$folder/jobs/bin/python" -m pip install --quiet kubeflow-trainer-api==2.3.0 pyyaml
unpacked skypilot 0.14.1 3.11
"$folder/jobs/bin/python" "$here/jobs_check.py" "$folder/files" "$folder/skypilot-source"
