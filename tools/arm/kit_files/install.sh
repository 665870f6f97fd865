#!/bin/sh
# sh install.sh [FOLDER]: install the runtime into a virtual environment of its own.
exec python3 "$(dirname "$0")/install.py" "$@"
