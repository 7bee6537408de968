#!/bin/sh
# Runs nvcc, its arguments, and keeps what ptxas says of each kernel in OBJECT.ptxas; everything else it says is shown.
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2> "$object.ptxas"
status=$?
grep -a -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas" >&2
exit $status
