#!/bin/sh
# Install Qatapult into a virtual environment; for the Dockerfile and the Apptainer definition alike.
#   install_image.sh dependencies VENV   the pinned dependencies: the slow layer, which changes rarely
#   install_image.sh project VENV        Qatapult itself, as a wheel built from the current folder
set -eu
what=$1 venv=$2
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }

case $what in
  dependencies)
    python3 -m venv "$venv"
    # First and alone: DeepSpeed builds against this torch. Its operators are not compiled here (that needs nvcc);
    # Qatapult's engines use none that must be.
    pip install -c constraints.txt torch numpy setuptools wheel
    DS_BUILD_OPS=0 pip install -c constraints.txt --no-build-isolation deepspeed
    requirements=$(mktemp)
    python3 - pyproject.toml > "$requirements" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *(line for name in ("triton", "export", "lm-eval", "wandb", "tensorboard") for line in extras[name])]
print("\n".join(wanted))
PYTHON
    pip install -c constraints.txt -r "$requirements"
    rm "$requirements"
    ;;
  project)
    wheels=$(mktemp -d)
    pip wheel --no-deps --no-build-isolation --wheel-dir "$wheels" .
    pip install --no-deps "$wheels"/qatapult-*.whl
    rm -r "$wheels"
    ;;
  *)
    echo "usage: $0 dependencies|project VENV" >&2
    exit 2
    ;;
esac
