#!/usr/bin/env bash
# Gather what a machine with CUDA's torch and no network lacks to run benchmarks/gpu.py, and print how to run it there.
#
#     bash benchmarks/gpu_folder.sh OUT [PYTHON]
#
# OUT: a folder that is not there yet. PYTHON: a Python with pip, default python3. The wheels are those of Python 3.12 on
# x86-64 Linux, in the versions of constraints.txt; torch, transformers, accelerate, triton, safetensors, numpy, PyYAML
# and what these need are expected there.
set -euo pipefail

LIMIT_MIB=60      # what one copy to such a machine may weigh
LIMIT_COMMAND=2000 # characters
LACKING="peft gguf psutil pydantic pydantic-core annotated-types typing-inspection typing-extensions typer click shellingham
    annotated-doc rich markdown-it-py mdurl pygments regex filelock threadpoolctl scipy"

[ $# -ge 1 ] || { echo "usage: bash benchmarks/gpu_folder.sh OUT [PYTHON]" >&2; exit 2; }
out=$1 python=${2:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -e "$out" ] || { echo "$out: asked to make this folder, it is there. Remove it or name another." >&2; exit 1; }
mkdir -p "$out/wheels"
out=$(cd "$out" && pwd)

# The pinned version where constraints.txt has one, else the newest that the pinned ones accept. pydantic names its core
# exactly, so that one is read out of its wheel.
asked() { sed 's/;.*//' "$root/constraints.txt" | grep -ix "$1==[^ ]*" || echo "$1"; }
platforms=(--platform manylinux2014_x86_64)
for glibc in 17 24 27 28; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
fetch() {
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version 3.12 "${platforms[@]}" -d "$out/wheels" "$@"
}
names=()
for name in $LACKING; do
    [ "$name" = pydantic-core ] || names+=("$(asked "$name")")
done
fetch "${names[@]}"
core=$("$python" - "$out"/wheels/pydantic-*.whl <<'PYTHON'
import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
print(re.search(r"^Requires-Dist: (pydantic-core==\S+)", wheel.read(metadata).decode(), re.M).group(1).rstrip(";"))
PYTHON
)
fetch "$core"

mkdir -p "$out/benchmarks/gpu_parts"
cp "$root"/benchmarks/{gpu,gpu_tables,provenance,rounds}.py "$out/benchmarks/"
cp "$root"/benchmarks/gpu_parts/*.py "$out/benchmarks/gpu_parts/"
(cd "$root" && find src -name '*.py' -exec cp --parents {} "$out/" \;)
find "$root/src" -type f ! -name '*.py' ! -name '*.pyc' | sed "s|^$root/||" | (cd "$root" && xargs -r cp --parents -t "$out/")
git -C "$root" describe --always --dirty > "$out/benchmarks/COMMIT"

command="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/spectune-site wheels/*.whl"
command="cd $(basename "$out") && $command && env PYTHONPATH=src:/tmp/spectune-site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1"
command="$command python3 benchmarks/gpu.py --seconds 540 --output \"\${OUT:-..}/gpu.json\""
printf '%s\n' "$command" > "$out/COMMAND"

kib=$(du -sk --apparent-size "$out" | cut -f1)
echo "$out: $((kib / 1024)) MiB of $LIMIT_MIB, $(ls "$out/wheels" | wc -l) wheels, commit $(cat "$out/benchmarks/COMMIT")"
[ "$kib" -le $((LIMIT_MIB * 1024)) ] || { echo "$out: $((kib / 1024)) MiB, at most $LIMIT_MIB can travel. Leave wheels out." >&2; exit 1; }
[ ${#command} -lt $LIMIT_COMMAND ] || { echo "$out: the command has ${#command} characters, the limit is $LIMIT_COMMAND." >&2; exit 1; }
echo "Run there, beside the folder:"
echo "$command"
