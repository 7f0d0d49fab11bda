#!/usr/bin/env bash
# The suite on the oldest release of transformers that pyproject.toml admits and on the newest one on the package
# index, each in a virtual environment of its own under build/versions; then each loads the checkpoints of the other.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

root=build/versions
bound=$(sed -nE 's/.*"transformers>=([0-9.]+)".*/\1/p' pyproject.toml)
mkdir -p "$root"
# All but torch is free to be what that release of transformers needs.
grep '^torch==' constraints.txt > "$root/constraints.txt"

install() { # name, requirement
    [ -x "$root/$1/bin/python" ] || python3 -m venv "$root/$1"
    "$root/$1/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" \
        --upgrade "$2" -e '.[dev]'
}
install oldest "transformers==$bound.*"
install newest "transformers"

for version in oldest newest; do
    python="$root/$version/bin/python"
    "$python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
    "$python" -m pytest -n auto --maxprocesses 4 -p no:cacheprovider -m 'slow or not slow' \
        --deselect tests/test_package.py::test_the_wheel_alone_in_an_empty_environment "$@"
    rm -rf "$root/$version-checkpoints"
    mkdir "$root/$version-checkpoints"
    "$python" tests/exchange_checkpoints.py write "$root/$version-checkpoints"
done
"$root/oldest/bin/python" tests/exchange_checkpoints.py check "$root/newest-checkpoints"
"$root/newest/bin/python" tests/exchange_checkpoints.py check "$root/oldest-checkpoints"
