# usage: lock.sh VENV_BIN
# Compiles requirements/{cpu,cuda,slow-tests}.lock from setup.py for Linux x86_64 and Python 3.11, every pin at its newest.
# The locks hold versions only: no index, no folder, no local version, so torch==2.13.0 takes the CPU build where one is
# offered and the common build elsewhere. The CUDA libraries of the common build are pinned by torch itself: the cpu lock
# leaves them out, because the CPU build does not have them.
set -eu
bin=$1
unset UV_FIND_LINKS
mkdir -p build/locks
compile() {
    "$bin/uv" pip compile setup.py --python-version 3.11 --python-platform x86_64-manylinux_2_28 --upgrade --quiet \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"
}
compile --extra cpu --extra dev --extra lora --extra tracking --override requirements/overrides-cpu.txt >build/locks/cpu.full
grep -Ev '^(nvidia|cuda)-' build/locks/cpu.full >build/locks/cpu.lock
compile --extra cuda --extra dev --extra lora --extra tracking --override requirements/overrides-cuda.txt >build/locks/cuda.lock
compile --extra slow-tests --override requirements/overrides-slow-tests.txt --constraint build/locks/cpu.full >build/locks/slow.full
grep -vxF -f build/locks/cpu.full build/locks/slow.full >build/locks/slow-tests.lock
mv build/locks/cpu.lock build/locks/cuda.lock build/locks/slow-tests.lock requirements/
