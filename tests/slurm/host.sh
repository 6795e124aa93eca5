#!/usr/bin/env bash
# PID 1 of one host of the test cluster, in namespaces of its own: host.sh FOLDER NAME ADDRESS [PRIVATE FOLDERS...].
# Without its daemons the host still runs: only a signal to this process ends it, and everything on it.
set -euo pipefail
folder=$1 name=$2 address=$3
shift 3

[[ $name != controller ]] || ip link add eth0 type bridge # the switch, which has the controller's address
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done # on a node, cluster.py plugs in the cable
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
hostname "$name"
mount --bind "$folder/hosts/$name/etc_hosts" /etc/hosts
mount -t tmpfs -o mode=1777 shm /dev/shm
for private; do
    own=$folder/hosts/$name/private/${private//\//_}
    mkdir -p "$own" "$private"
    mount --bind "$own" "$private"
done

if [[ $name == controller ]]; then
    munge=$folder/munge
    munged --foreground --force --key-file="$munge/key" --socket="$munge/socket" --seed-file="$munge/seed" \
        --log-file="$munge/log" --pid-file="$munge/pid" --num-threads=4 &
    slurmctld -D -f "$folder/slurm.conf" &
else
    slurmd -D -N "$name" -f "$folder/slurm.conf" &
fi
while :; do sleep 3600 & wait $! || true; done # buries the dead
