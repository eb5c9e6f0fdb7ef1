#!/bin/sh
# The reference run in sessions of limited time, for a machine that is available for half an hour:
#
#     tests/benchmarks/reference.sh SECONDS DIRECTORY [train.py's flags]
#     tests/benchmarks/reference.sh 540 work/cifar10-bc100.300 --data data
#
# Trains BC 100-12 with the default flags for at most SECONDS, then stops it with SIGTERM; the same command continues it.
# To continue on another machine, copy DIRECTORY.
# Exit status: 0 the run has ended, 75 (EX_TEMPFAIL) it has to be continued, any other: train.py failed with it.

set -u
if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    echo "usage: reference.sh SECONDS DIRECTORY [train.py's flags]; SECONDS is a whole number from 1" >&2
    exit 2
fi
seconds=$1
directory=$2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd) || exit 2

# SIGKILL follows SIGTERM after a minute; --no-plot: drawing figures would take time from the training
timeout --kill-after=60 "$seconds" "${PYTHON:-python3}" "$root/train.py" --save "$directory" --resume --no-plot "$@"
status=$?
case $status in
    124 | 137 | 143) ;;  # timeout's own status, SIGKILL, SIGTERM
    *) exit $status ;;
esac
epochs=0
[ -f "$directory/test.csv" ] && epochs=$(($(wc -l < "$directory/test.csv") - 1))
echo "reference.sh: $directory has $epochs epochs; the same command continues it"
exit 75
