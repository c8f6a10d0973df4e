#!/usr/bin/env bash
# Upload the built files of one package: PUBLISH_URL=... ci/publish.sh PACKAGE
#
# There is no default index. Only hosts in ci/publish-hosts.txt are allowed, and `adasplash` and
# `mole` never go to the public index, where these names belong to others.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
package="${1:?say which package: ci/publish.sh PACKAGE}"
if [ -z "${PUBLISH_URL:-}" ]; then
  echo "PUBLISH_URL must name the index to upload to; there is no default" >&2
  exit 2
fi

host=$("$python" -c 'import sys, urllib.parse as u; print(u.urlsplit(sys.argv[1]).hostname or "")' "$PUBLISH_URL")
public=$("$python" -c 'from pip._internal.models.index import PyPI; print(PyPI.netloc)')
case "$package" in
  adasplash | mole)
    if [ "$host" = "$public" ] || [[ "$host" == *".$public" ]]; then
      echo "refused: on the public index the name $package belongs to another project" >&2
      exit 2
    fi
    ;;
esac
if ! grep -qxF -- "$host" ci/publish-hosts.txt; then
  echo "refused: host '$host' of PUBLISH_URL is not in ci/publish-hosts.txt" >&2
  exit 2
fi

name=${package/#common/fourfold-common}
files=(dist/"${name//-/_}"-*)
if [ ! -e "${files[0]}" ]; then
  echo "nothing to upload: run 'make wheels' first" >&2
  exit 2
fi
"$python" -m pip install --quiet -c ci/constraints.txt twine
"$python" -m twine upload --non-interactive --repository-url "$PUBLISH_URL" "${files[@]}"
