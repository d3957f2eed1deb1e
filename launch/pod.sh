#!/usr/bin/env bash
# Runs a program on every worker of a TPU VM slice.
#
#   export NAME=my-slice ZONE=us-east5-a BUCKET=my-bucket
#   launch/pod.sh install
#   launch/pod.sh run launch/train.py --config=configs/bouncing.py:distill \
#     --config.workdir=/mnt/hiar/distill
#   launch/pod.sh logs       # the last lines of every worker
#   launch/pod.sh status     # what runs where
#   launch/pod.sh stop       # SIGTERM: saves the last iteration, then ends
#   launch/pod.sh resume launch/train.py ...   # the same command as before
#
# install  sends the last commit, makes a virtual environment on every worker
#          and mounts the bucket. Again after a commit, or on new workers.
# run      starts the program in the background; it outlives this shell. A
#          program that fails is started again and goes on from its last
#          checkpoint, see launch/retry.sh. `resume` is another name for it.
#
# NAME, ZONE   of the slice (gcloud compute tpus tpu-vm list).
# PROJECT      of the slice; default: gcloud's own.
# BUCKET       mounted at /mnt/hiar with gcsfuse. It needs a hierarchical
#              namespace: without one a folder is not renamed in one move, and
#              a checkpoint could be half there. Without BUCKET, /mnt/hiar (or
#              SHARED) is a disk that is mounted by other means.
# SHARED       folder that all workers see, for configs, checkpoints,
#              trajectories; default /mnt/hiar.
# Logs         ~/hiar_jax/run.log on every worker; it grows over restarts. The
#              metrics are in the config's workdir.
# TAIL         how many lines of each worker `logs` shows; default 5.
# DRY_RUN=1    prints the commands instead.
set -euo pipefail

readonly usage='usage: NAME=... ZONE=... launch/pod.sh
  install | run PROGRAM [ARGS] | resume PROGRAM [ARGS] | logs | status | stop'

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

action=${1:-}
[[ -n "$action" ]] || fail "$usage"
shift
[[ -n "${NAME:-}" ]] || fail 'NAME, of the TPU slice, is not set'
[[ -n "${ZONE:-}" ]] || fail 'ZONE, of the TPU slice, is not set'
readonly shared=${SHARED:-/mnt/hiar} home=hiar_jax
place=(--zone "$ZONE")
[[ -z "${PROJECT:-}" ]] || place+=(--project "$PROJECT")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# do_it COMMAND...: runs it, or prints it as one could paste it.
do_it() {
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# everywhere SCRIPT: in bash on all workers at once.
everywhere() {
  do_it gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" \
    --worker=all --command "$1"
}

install() {
  archive=$(mktemp --suffix .tar.gz)
  trap 'rm -f "$archive"' EXIT
  do_it git -C "$root" archive --format=tar.gz -o "$archive" HEAD
  do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:hiar_jax.tar.gz" \
    "${place[@]}" --worker=all
  # The images' own Python may be older than 3.11; uv brings one.
  everywhere "set -e
mkdir -p $home && tar -xzf hiar_jax.tar.gz -C $home && cd $home
python3 -m pip install --quiet --user --upgrade uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
  [[ -z "${BUCKET:-}" ]] || everywhere "set -e
sudo mkdir -p $shared && sudo chown \"\$USER\" $shared
mountpoint -q $shared || gcsfuse --implicit-dirs ${BUCKET} $shared"
  everywhere "ls -d $shared $home/.venv"
}

# Every worker finds the others by the slice's metadata.
run() {
  (($#)) || fail "$usage"
  [[ -f "$root/$1" ]] || fail "no program '$1' in $root"
  local command
  command=$(printf '%q ' .venv/bin/python -u "$@")
  everywhere "set -e
cd $home
if [[ -f run.pid ]] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then
  echo \"error: \$(hostname) already runs a program; launch/pod.sh stop\" >&2
  exit 2
fi
export JAX_COMPILATION_CACHE_DIR=\$PWD/.programs
nohup setsid launch/retry.sh $command </dev/null \
  >>run.log 2>&1 &
echo \$! >run.pid
echo \"\$(hostname): \$PWD/run.log\""
}

case "$action" in
  install) install ;;
  run | resume) run "$@" ;;
  logs) everywhere "tail -n ${TAIL:-5} $home/run.log" ;;
  status)
    everywhere "cd $home && if kill -0 \"\$(cat run.pid)\" 2>/dev/null
then echo \"\$(hostname): runs\"; else echo \"\$(hostname): idle\"; fi"
    ;;
  # All get it before any is waited for: they save together.
  stop)
    everywhere "cd $home && kill -TERM \"\$(cat run.pid)\" 2>/dev/null || true"
    ;;
  *) fail "'$action' is no action; $usage" ;;
esac
