#!/usr/bin/env bash
# Tests with other versions of torch, each in an environment of its own:
#
#     tests/versions.sh 2.11.0 2.14.1
#     PYTHON=python3.12 TESTS="test_optim.py tests/test_card.py" tests/versions.sh 2.11.0
#
# TESTS are by default those that depend on torch. A version that pip cannot install is skipped.
set -eu
cd "$(dirname "$0")/.."
default="test_optim.py tests/test_rivals.py tests/test_contracts.py tests/test_sharding.py
    tests/test_model.py tests/test_train.py tests/test_resume.py tests/test_card.py
    tests/test_compiler.py"
environments=$(mktemp -d)
trap 'rm -rf "$environments"' EXIT
failed=
for version in "$@"; do
    gigabytes=$(df -Pk "$environments" | awk 'END {print int($4 / 1e6)}')
    "${PYTHON:-python3}" -m venv "$environments/$version"
    python=$environments/$version/bin/python
    if [ "$gigabytes" -lt 12 ]; then
        echo "skipped: torch $version needs 12 GB of disk, $gigabytes are free"
    elif ! "$python" -m pip install --quiet "torch==$version" numpy tqdm tiktoken pytest; then
        echo "skipped: pip cannot install torch $version here"
    else
        "$python" -c "import sys, torch; print('torch', torch.__version__, 'Python', sys.version)"
        "$python" -m pytest -q -rs ${TESTS:-$default} || failed="$failed $version"
    fi
    rm -rf "${environments:?}/$version"
done
[ -z "$failed" ] || { echo "failed with torch$failed"; exit 1; }
