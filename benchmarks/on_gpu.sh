#!/usr/bin/env bash
# What is not measured yet, on a GPU, the most telling first:
#     bash benchmarks/on_gpu.sh
# The same command again continues. All results are in one folder: $OUT, or runs/on_gpu. From the environment, too:
# DATA, the folder of CIFAR-10 or of images (default: data); NADS_REFERENCE, the authors' files, to compare with;
# WORKERS, processes on the GPU (default: 6); PYTHON, the interpreter; DRY=1 only prints the commands.
set -u
out=$(realpath -m "${OUT:-runs/on_gpu}") data=$(realpath -m "${DATA:-data}")
theirs=${NADS_REFERENCE:+$(realpath "$NADS_REFERENCE")}
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
export TQDM_MININTERVAL=10 # seconds: the output goes to files
failed=0 workers=${WORKERS:-6} maps=() curves=()
[[ ! $theirs ]] || maps=(--published "$theirs/fourier_accuracies.csv") curves=(--published "$theirs/nad_accuracies.csv")

step() { # NAME COMMAND...: unless it is done; what it prints goes to NAME.txt, its seconds and exit code to steps.csv
    ! grep -qs "^$1,.*,0$" "$out/steps.csv" || return 0
    echo "$1: ${*:2}"
    [[ ! ${DRY:-} ]] || return 0
    local begin=$SECONDS code=0
    "${PYTHON:-python3}" "${@:2}" &>>"$out/$1.txt" || code=$?
    echo "$1,$((SECONDS - begin)),$code" | tee -a "$out/steps.csv"
    ((code == 0)) || failed=1
    find "$out" -name 'weights-*.pt' -delete # large, and nothing continues from them
    return $code
}
run() { # SCRIPT NAME OPTION...: in bf16, from what results/ has of this run; each of its rows says its device
    local folder=$out/$1/$2
    if [[ ! -d $folder && -d results/$1/$2 && ! ${DRY:-} ]]; then
        mkdir -p "$out/$1" && cp -r "results/$1/$2" "$folder"
        sed -i 's/"device": "cpu"/"device": "cuda"/' "$folder/config.json"
    fi
    step "$2" "$1.py" --precision bf16 --workers "$workers" --output "$folder" "${@:3}"
}
map() { # NAME FREQUENCIES OPTION...: the cells that results/ lacks of a map, without mirror images
    local cells=() y x
    for y in $2; do for x in $2; do
        grep -qs "^$((-y)),$((-x))," "results/directional_bias/$1/accuracies.csv" ||
            cells+=(--frequency $((-y)) $((-x)))
    done; done
    ((${#cells[@]} == 0)) || run directional_bias "$1" "${@:3}" "${cells[@]}"
}
cifar() { # NAME OPTION...
    run poison_cifar "$1" --data "$data" "${@:2}"
}

step tests -m pytest -q -m gpu tests
map ResNet18-bf16-fourier "0 2 4 6 8 10 12 14 16" --arch resnet18 "${maps[@]}"
cifar ResNet18-bf16-poison --arch resnet18 --nad-index 10,100,200,400,1000
[[ ! $theirs ]] ||
    cifar ResNet18-bf16-published_nads-poison --arch resnet18 --nads "$theirs/ResNet18_NADs.npy" --nad-index 0
for script in NADs_scripts/*_nad.py; do
    name=nads-$(basename "$script" _nad.py)
    step "$name" "$script" --workers "$workers" --output "$out/NADs" --checkpoints "$out/$name" &&
        rm -f "$out/$name"/part-*.pt
done
map DenseNet121-bf16-fourier "0 2 4 6 10 14" --arch densenet121
for arch in DenseNet121 VGG11; do
    run directional_bias "$arch-bf16-nads" --arch "${arch,,}" --directions nads --nad-index 10:1000:52 "${curves[@]}"
done
run directional_bias ResNet18-bf16-nopooling-sigma1-fourier --arch resnet18 --no-pooling --sigma 1 \
    --frequency 0 0 --frequency 0 -8 --frequency -8 -8 --frequency -4 -10 --frequency -14 -10 --frequency -16 -16
for arch in ResNet18 DenseNet121; do
    for way in none flip; do cifar "$arch-bf16-$way" --arch "${arch,,}" --transform $way; done
done
step table-1 -m benchmarks.table --arch resnet18 lenet --processes 1
step "table-$workers" -m benchmarks.table --arch resnet18 --processes "$workers" --warm-up 20
exit $failed
