#!/usr/bin/env bash
# Copy a virtual environment to the local disk of each node, once a node, as one archive: starting Python reads thousands
# of small files, which a shared file system serves slowly to many nodes.
#
#   bash launch/stage.sh pack VENV ARCHIVE.tar        (once, where the environment was made)
#   srun --ntasks-per-node=1 bash launch/stage.sh unpack ARCHIVE.tar FOLDER
#   srun FOLDER/bin/python -m fedprompt_mpi FLAGS...
#
# FOLDER is a new one on each node's own disk, such as $TMPDIR/fedprompt. The environment must hold the package itself
# (pip install ., not -e). Programs in FOLDER/bin still name the old place: start them by FOLDER/bin/python -m.
set -euo pipefail

if [ $# -eq 3 ] && [ "$1" = pack ] && [ -x "$2/bin/python" ]; then
  tar -C "$2" -cf "$3.part" .
  mv "$3.part" "$3"
elif [ $# -eq 3 ] && [ "$1" = unpack ] && [ -f "$2" ]; then
  if [ -e "$3" ]; then
    [ -O "$3" ] || { echo "$3 belongs to somebody else: name another folder" >&2; exit 2; }
    exit 0 # it was unpacked before
  fi
  part=$(mktemp -d "$3.XXXXXX") # whole or not at all, also if two tasks of a node do it at once
  trap 'rm -rf "$part"' EXIT
  tar -C "$part" -xf "$2"
  mv -T "$part" "$3" 2>/dev/null || [ -O "$3" ]
else
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
