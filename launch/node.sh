#!/usr/bin/env bash
# One machine's processes of a run, by torchrun, and an exit status that torchrun does not give: 75, interrupted, start it again.
#     launch/node.sh RUN [options of vae_dist.train]
# How many there are and where they meet, torchrun reads from PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and
# PET_MASTER_PORT, as Kubeflow sets them. The container's entry point.
set -uo pipefail
run=${1:?the folder of the run}
shift
before=$(cat "$run/status.json" 2>/dev/null)
torchrun --signals-to-handle=SIGTERM,SIGINT --shutdown-timeout=90 -m vae_dist.train "$@" --output "$run" &
torchrun=$!
told=
trap 'told=yes; kill -TERM "$torchrun"' TERM INT

# A signal ends the wait, not torchrun: its processes write a checkpoint first.
status=0
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun"
    status=$?
done

# A state that an earlier start left behind says nothing of this one.
after=$(cat "$run/status.json" 2>/dev/null)
state=$([ "$after" = "$before" ] || sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' <<<"$after")
case $state in
finished) exit 0 ;;
interrupted) exit 75 ;;
failed) exit "$status" ;;
esac
[ -z "$told" ] || exit 75
exit "$status"
