#!/usr/bin/env bash
# Runs a training command until it succeeds:  scripts/restart.sh OUT COMMAND...
#
# The command must have --resume, so that each start goes on from the newest whole checkpoint of OUT. Gives up when three
# starts in a row end without a new checkpoint. A run that a signal told to stop has succeeded. RESTART_WAIT: seconds between.
set -uo pipefail

if (( $# < 2 )); then sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
out=$1
shift
failures=0
latest() { readlink "$out/latest" 2>/dev/null || echo none; }

while true; do
    before=$(latest)
    "$@" && exit 0
    status=$?
    if [[ $(latest) == "$before" ]]; then failures=$((failures + 1)); else failures=1; fi
    if (( failures >= 3 )); then
        echo "restart.sh: ended with status $status three times without a new checkpoint; the newest is $(latest). Giving up." >&2
        exit "$status"
    fi
    echo "restart.sh: ended with status $status; starting again from $(latest) in ${RESTART_WAIT:-30} s" >&2
    sleep "${RESTART_WAIT:-30}"
done
