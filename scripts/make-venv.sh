#!/bin/sh
# Make a virtual environment in the folder $1 with the first Python that is new enough. Debian and Ubuntu ship Python without the venv
# module's parts; where that is so and we may, install them, and otherwise say what to install.
set -eu
folder=$1

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

found=
for candidate in ${PYTHON:-python3} python3.13 python3.12 python3.11 python3; do
    if new_enough "$candidate"; then found=$candidate; break; fi
done
if [ -z "$found" ]; then
    echo "Headwater needs Python 3.11 or newer; on Debian or Ubuntu: apt-get install python3 python3-venv" >&2
    echo "If it is installed under another name: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

if ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
    package=python$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "installing $package, which this Python lacks" >&2
        apt-get update -qq && apt-get install -y -qq "$package" >/dev/null
    else
        echo "This Python cannot make virtual environments. Please install the package $package:" >&2
        echo "    sudo apt-get install $package" >&2
        exit 1
    fi
fi
rm -rf "$folder"
"$found" -m venv "$folder"
