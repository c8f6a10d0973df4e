#!/usr/bin/env bash
# Install each built wheel alone (with common) in a fresh environment, leave the checkout, and run
# its smoke test; then install all of them together.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
python="${PYTHON:-python3}"
packages=("${1:-}")
[ -n "${packages[0]}" ] || packages=(adasplash hetero-sd conceptattention mole)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

wheel() { # the newest wheel of a distribution
  ls -t "$root"/dist/"${1//-/_}"-*.whl | head -n 1
}

environment() { # folder, wheels: a fresh environment that holds just these wheels and their needs
  "$python" -m venv "$1"
  "$1/bin/python" -m pip install --quiet -c "$root/ci/constraints.txt" "${@:2}"
  "$1/bin/python" -m pip check
}

common=$(wheel fourfold-common)
for package in "${packages[@]}"; do
  echo "smoke test of $package alone"
  file=$(wheel "$package")
  environment "$scratch/$package" "$common" "$file"
  version=$(basename "$file" | cut -d- -f2)
  (
    cd "$scratch"
    bin="$scratch/$package/bin"
    "$bin/python" - "${package//-/_}" "$version" <<'PY'
import importlib, sys

name, version = sys.argv[1:]
found = importlib.import_module(name).__version__
if found != version:
    sys.exit(f"{name} says version {found}, its wheel {version}")
PY
    "$bin/python" "$root/packages/common/tests/smoke.py" >/dev/null
    PATH="$bin:$PATH" "$bin/python" "$root/packages/$package/tests/smoke.py"
  )
  # The environments are large: keep only one at a time.
  rm -rf "${scratch:?}/$package"
done

if [ -z "${1:-}" ]; then
  echo "all wheels together"
  files=("$common")
  for package in "${packages[@]}"; do files+=("$(wheel "$package")"); done
  environment "$scratch/all" "${files[@]}"
  cd "$scratch"
  for package in "${packages[@]}"; do
    "$scratch/all/bin/python" -c "import ${package//-/_}"
    "$scratch/all/bin/$package" --version
  done
fi
echo "smoke tests passed"
