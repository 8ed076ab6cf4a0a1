#!/usr/bin/env bash
# pack.sh FILE: this working tree as a tarball, edits and new files included, what git ignores left out.
#
# It carries the time of packing: whoever installs from it takes no package newer than that, today or after the tenth
# preemption.
set -euo pipefail

[[ $# == 1 && $1 != -* ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1 ||
  { echo "pack.sh: $root is no git working tree: clone the repository instead of unpacking it" >&2 && exit 1; }
stamp=$(mktemp -d)
trap 'rm -rf "$stamp"' EXIT
date -u +%Y-%m-%dT%H:%M:%SZ >"$stamp/.packed-at"
cd "$root"
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done >"$stamp/files"
COPYFILE_DISABLE=1 tar --null -T "$stamp/files" -czf "$1.partial" -C "$stamp" .packed-at
mv "$1.partial" "$1"
