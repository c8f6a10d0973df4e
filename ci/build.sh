#!/usr/bin/env bash
# Build the wheel and the sdist of every package, or of the one named, into dist/.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
packages=("${1:-}")
[ -n "${packages[0]}" ] || packages=(common adasplash hetero-sd conceptattention mole)

for package in "${packages[@]}"; do
  echo "building $package"
  name=${package/#common/fourfold_common}
  rm -f dist/"${name//-/_}"-*
  "$python" -m build --no-isolation --outdir dist "packages/$package" >/dev/null 2>&1 ||
    "$python" -m build --no-isolation --outdir dist "packages/$package"
done

limit=$((15 * 1024 * 1024))
for wheel in dist/*.whl; do
  size=$(wc -c <"$wheel")
  printf '%9d bytes  %s\n' "$size" "$wheel"
  if [ "$size" -gt "$limit" ]; then
    echo "$wheel is over the limit of $limit bytes" >&2
    exit 1
  fi
done
