#!/bin/sh
# Runs its arguments, an nvcc command, writes ptxas's report to OBJECT.ptxas and forwards all other messages to stderr.
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2> "$object.ptxas"
status=$?
grep -a -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas" >&2
exit $status
