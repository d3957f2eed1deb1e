#!/usr/bin/env bash
# Runs a command until it succeeds: a run that was killed goes on from its last
# checkpoint, and so do the others, which end when one of them dies.
#
#   launch/retry.sh python launch/train.py --config=configs/bouncing.py:teacher
#
# Stops at once at exit status 2, a mistake that another try would repeat, and
# after RETRIES failures (20). Waits RETRY_SECONDS (15) between two tries.
# SIGTERM is handed on, and ends it. DRY_RUN=1 prints the command.
set -uo pipefail

if (($# == 0)); then
  echo 'error: retry.sh needs a command' >&2
  exit 2
fi
if [[ "${DRY_RUN:-0}" == 1 ]]; then
  printf '%q ' "$@"
  echo
  exit 0
fi

child=0
stopped=0
trap 'stopped=1; ((child)) && kill -TERM "$child"' TERM

for ((try = 1; ; try++)); do
  "$@" &
  child=$!
  # A signal ends `wait` while the command still saves.
  while true; do
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=0
  if ((status == 0 || status == 2 || stopped)); then
    exit "$status"
  fi
  if ((try > ${RETRIES:-20})); then
    echo "retry.sh: exit status $status at try $try; giving up" >&2
    exit "$status"
  fi
  echo "retry.sh: exit status $status at try $try; again" >&2
  sleep "${RETRY_SECONDS:-15}" &
  wait $!
  ((stopped)) && exit "$status"
done
