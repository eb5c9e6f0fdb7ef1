#!/bin/sh
# The reference run in pieces that are bounded in time, for a machine that is lent for half an hour:
#
#     tests/benchmarks/reference.sh SECONDS DIRECTORY [train.py's flags]
#     tests/benchmarks/reference.sh 540 work/cifar10-bc100.reference --data data
#
# Trains BC 100-12 with the default flags for SECONDS at most and stops it by SIGTERM; the same command continues it.
# DIRECTORY alone is what another machine needs to go on (train.csv and test.csv, run.json, latest.pth).
# Exit status: 0 the run has ended, 75 (EX_TEMPFAIL) it has to be continued, otherwise train.py's.

set -u
if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    echo "usage: reference.sh SECONDS DIRECTORY [train.py's flags]; SECONDS is a whole number from 1" >&2
    exit 2
fi
seconds=$1
directory=$2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd) || exit 2

# after SIGTERM a save has a minute to end; --no-plot: a figure an epoch would cost the GPU's time
timeout --kill-after=60 "$seconds" "${PYTHON:-python3}" "$root/train.py" --save "$directory" --resume --no-plot "$@"
status=$?
case $status in
    124 | 137 | 143) ;;  # timeout's own, SIGKILL, SIGTERM
    *) exit $status ;;
esac
epochs=0
[ -f "$directory/test.csv" ] && epochs=$(($(wc -l < "$directory/test.csv") - 1))
echo "reference.sh: $directory has $epochs epochs; the same command continues it"
exit 75
