#!/usr/bin/env bash
# Runs the fast tests on the oldest and on the newest versions that setup.py
# allows, each in a fresh clone with a fresh environment, and prints a table.
#
#   tests/versions.sh                       # both ends
#   OLDEST=3.11 NEWEST=3.13 tests/versions.sh newest
#   NEWEST=/opt/python3.13/bin/python3 tests/versions.sh
#   tests/versions.sh oldest tests/training/losses_test.py -k forward
#
# OLDEST and NEWEST are Python versions or interpreters; uv finds or fetches
# them. After the end's name (oldest, newest, both) come arguments of pytest.
# Checks the last commit. Needs git, python3 and PyPI; non-zero on any failure.
set -uo pipefail
exec </dev/null

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV XLA_FLAGS "${!JAX_@}"
export PYTHONUNBUFFERED=1

which=${1:-both}
shift || true
case $which in
  both | oldest | newest) ;;
  *)
    echo "versions.sh: '$which' is not one of both, oldest, newest" >&2
    exit 2
    ;;
esac

python3 -m venv "$work/uv" && "$work/uv/bin/pip" install -q uv || exit 1
uv=$work/uv/bin/uv
shown=(jax flax optax orbax-checkpoint grain numpy pillow safetensors)
rows=()
failed=0

# end NAME PYTHON RESOLUTION [PYTEST ARGUMENTS]
end() {
  local name=$1 python=$2 resolution=$3 venv=$work/$1.venv
  shift 3
  printf '\n== %s: Python %s, %s\n' "$name" "$python" "$resolution"
  if ! {
    git clone -q "$root" "$work/$name" &&
      "$uv" venv -q --python "$python" "$venv" &&
      (cd "$work/$name" && "$uv" pip install -q --python "$venv/bin/python" \
        --resolution "$resolution" -e '.[test]')
  }; then
    rows+=("$name could not be installed")
    failed=1
    return
  fi
  (cd "$work/$name" && "$venv/bin/python" -m pytest -n 2 --dist loadfile \
    -m 'not slow' "$@") 2>&1 | tee "$work/$name.log"
  [[ ${PIPESTATUS[0]} == 0 ]] || failed=1
  local versions result
  versions=$("$venv/bin/python" - "${shown[@]}" <<'PY'
import importlib.metadata
import platform
import sys

found = [f'Python {platform.python_version()}']
found += [f'{n} {importlib.metadata.version(n)}' for n in sys.argv[1:]]
print(', '.join(found))
PY
  )
  result=$(grep -E '^=+ .*(passed|failed|error).* =+$' "$work/$name.log" |
    tail -n 1 | tr -d '=')
  rows+=("$name |${result:- no result } | $versions")
}

if [[ $which != newest ]]; then
  end oldest "${OLDEST:-3.11}" lowest-direct "$@"
fi
if [[ $which != oldest ]]; then
  end newest "${NEWEST:-3.13}" highest "$@"
fi
printf '\n== versions\n'
printf '%s\n' "${rows[@]}"
exit "$failed"
