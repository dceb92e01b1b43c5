#!/usr/bin/env bash
# Most of what the README marks as not run, and times, on a GPU, the most telling first, in calls of under ten minutes:
#     bash benchmarks/on_gpu.sh RESULTS STATE [DATA]
# The same command again continues, until it says "all done". STATE keeps rows, checkpoints and what is done; RESULTS
# gets each step's output, its seconds, and the small files. DATA is CIFAR-10's folder, or one of images; without it
# those steps are skipped. From the environment: PYTHON, the interpreter; LIMIT, seconds of a call; RANKS, processes
# that share the GPU; OPTIONS of the runs, like "--precision bf16" or "--device cpu"; SMALL=1, tiny sizes, to try it:
# these in folders of their own.
set -u
trap 'kill ${!:-}; exit 130' INT TERM
export TQDM_MININTERVAL=10 # seconds: the output goes to files
[[ $# -ge 2 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" "$2"
results=$(realpath "$1") state=$(realpath "$2") data=$(realpath -m "${3:-/nowhere}") limit=${LIMIT:-570} failed=0
ranks=${RANKS:-6}
cd "$(dirname "$0")/.." || exit 2
read -ra options <<<"${OPTIONS:-}"
tables=(lenet resnet18 vgg11 densenet121) table=() cells=() size=() epochs=() networks=() nads=10:1000:52
poison=0,10,20,50,100,150,200,300,400,500,800,1000,1020
if [[ ${SMALL:-} ]]; then
    size=(--epochs 1 --num-train 256 --num-test 256) cells=(--frequency 0 0 --frequency 2 2) epochs=(--epochs 1)
    tables=(lenet) table=(--steps 2 --networks 2) networks=(--num-networks 2) poison=0,10 nads=10,62
fi
end() { # CODE MESSAGE: copy the small files, and end
    (cd "$state" && find . -regex '.*\(\.csv\|\.json\|\.png\|_eigenvals\.npy\)' -exec cp --parents -t "$results" {} +)
    echo "$2" && exit "$1"
}
step() { # NAME COMMAND...: do what is not done yet, in the time that is left
    [[ ! -e $state/$1.done ]] || return 0
    ((limit - SECONDS > 45)) || end 75 "time is up: the same command continues with $1"
    local start=$SECONDS left=$((limit - SECONDS - 15)) code=0
    timeout -k 15 $left "${PYTHON:-python3}" "${@:2}" &>>"$results/$1.txt" & # with all processes that it starts
    wait $! || code=$?
    echo "$1,$((SECONDS - start)),$code" | tee -a "$results/seconds.csv" # of this call; code 0: done
    if ((code == 0)); then touch "$state/$1.done"
    elif ((SECONDS - start >= left)); then end 75 "time is up: the same command continues with $1"
    else failed=1 && echo "$1 failed: see $results/$1.txt"; fi
}
run() { # NAME SCRIPT OPTION...
    local shared=(-m torch.distributed.run --nproc-per-node "$ranks")
    step "$1" "${shared[@]}" "$2.py" --output "$state/$1" "${options[@]}" "${@:3}"
}
map() { run "$1" directional_bias --arch "${@:2}" "${size[@]}" "${cells[@]}"; }
cifar() {
    [[ -d $data/train || -d $data/cifar-10-batches-py ]] || { echo "$1: skipped, no images in $data" && return; }
    run "$1" poison_cifar --data "$data" "${epochs[@]}" "${@:2}"
}

step tests -m pytest -q -m gpu tests --ignore tests/test_notebook.py
for arch in "${tables[@]}"; do
    step "table-$arch" benchmarks/table.py --arch "$arch" --processes "$ranks" "${table[@]}"
done
run predict-resnet18 predict --arch resnet18
run nads-lenet nad_computation --arch lenet "${networks[@]}"
run along-nads-resnet18 directional_bias --arch resnet18 --directions nads --nad-index $nads "${size[@]}"
map map-vgg11 vgg11
for arch in resnet18 vgg11; do for way in none flip; do cifar $way-$arch --arch $arch --transform $way; done; done
map map-resnet18 resnet18
cifar poison-resnet18 --arch resnet18 --nad-index $poison
for way in none flip; do cifar $way-densenet121 --arch densenet121 --transform $way; done
map map-densenet121 densenet121
run nads-resnet18 nad_computation --arch resnet18 --num-networks 320 "${networks[@]}"
cifar poison-lenet --arch lenet --nad-index 0
map map-lenet lenet
map map-resnet18-nopooling resnet18 --no-pooling
((failed)) && end 1 "some steps failed: their output is in $results; the same command tries them again"
end 0 "all done"
